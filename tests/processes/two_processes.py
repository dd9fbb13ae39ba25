"""The tests' tiny run for the command line, long enough to be stopped in."""

from tests.train.conftest import tiny_config


def get_config():
    config = tiny_config()
    config.stages.answering.steps = 40
    return config

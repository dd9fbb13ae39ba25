"""The tests' tiny run, long enough to be killed in."""

from tests.train.conftest import tiny_config


def get_config():
    config = tiny_config()
    config.stages.answering.steps = 120
    config.loop.save_every = 25
    return config

"""The second stage of the tests' tiny run, long enough to be stopped in."""

from tests.train.conftest import tiny_config


def get_config():
    config = tiny_config()
    with config.unlocked():
        del config.stages.seeing
        config.schedule = ("answering",)
    config.stages.answering.steps = 24
    return config

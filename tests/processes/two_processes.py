"""The second stage of the tests' tiny run, long enough to be stopped in."""

from tests.train.conftest import tiny_config

STEPS = 120


def get_config():
    config = tiny_config()
    with config.unlocked():
        del config.stages.seeing
        config.schedule = ("answering",)
        config.loop.watchdog = 60.0
    config.stages.answering.steps = STEPS
    return config

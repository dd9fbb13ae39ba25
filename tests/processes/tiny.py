"""The second stage of the tests' tiny run, long enough to be killed in.

Two stages take twice the time of tracing in each process; tests/train/test_loop.py stops and resumes both.
"""

from tests.train.conftest import tiny_config


def get_config():
    config = tiny_config()
    with config.unlocked():
        del config.stages.seeing
        config.schedule = ("answering",)
    config.stages.answering.steps = 80
    config.loop.save_every = 20
    config.evaluation.update({"batch_size": 12, "every": 30})
    return config

"""A sweep of two tiny points behind a shared stage, long enough for a host to be killed in."""

from ml_collections import ConfigDict

from tests.train.conftest import tiny_config


def get_config():
    sweep = ConfigDict({"base": tiny_config().unlock()})
    sweep.base.encoder.patch_size = 12
    sweep.base.stages.answering.steps = 300
    sweep.base.loop.save_every = 50
    sweep.candidates = ConfigDict(
        {
            "pool": {"budgets": (1,), "connector": {"kind": "pool"}},
            "random": {"budgets": (2,), "connector": {"kind": "mlp"}, "reducer": {"kind": "random"}},
        }
    )
    sweep.sweep = ConfigDict({"shared": ("seeing",), "seeds": (0,), "controls": ("random",)})
    return sweep.lock()

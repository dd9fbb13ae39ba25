"""A sweep of two tiny points behind a shared stage, long enough for a host to be killed in."""

from ml_collections import ConfigDict

from tests.train.conftest import tiny_config


def get_config(arg: str = ""):
    """`halving`: fewer steps, and two points for one token, of which one learns nothing."""
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
    if arg == "halving":
        sweep.base.stages.answering.steps = 60
        still = sweep.base.stages.answering.to_dict() | {"learning_rates": {"connector": 1e-9, "decoder": 1e-9}}
        sweep.base.stages.still = ConfigDict(still)
        pool = sweep.candidates.pool.to_dict()
        sweep.candidates = ConfigDict({"pool": pool, "still": pool | {"schedule": ("still",)}})
        sweep.sweep.update({"controls": (), "halving": {"first_steps": 20, "factor": 3}})
    return sweep.lock()

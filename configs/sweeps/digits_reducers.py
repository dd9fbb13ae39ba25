"""What do training-free reducers lose on one trained system, beside a connector that is trained for the budget?"""

from ml_collections import ConfigDict

from configs.sweeps import digits_token_budget

KINDS = ("visionzip", "divprune", "fastv", "random", "uniform_stride")


def get_config(arg: str = "") -> ConfigDict:
    """One system is trained; reducers at 4, 16 and 32 of its 64 tokens are evaluated on it, pooling is adapted to it.

    Args:
      arg: "" for the sweep; `small` for a few minutes of it; `smoke` for a few steps and three points.
    """
    config = digits_token_budget.get_config(arg)
    config.unlock()
    candidates = {"none": {"budgets": (64,)}}
    candidates |= {kind: {"budgets": (4, 16, 32), "reducer": {"kind": kind}} for kind in KINDS}
    candidates["pool"] = {"budgets": (4, 16), "connector": {"kind": "pool"}, "schedule": ("adaptation",)}
    config.sweep.controls = ("random", "uniform_stride")
    if arg == "smoke":
        candidates = {name: candidates[name] | {"budgets": (16,)} for name in ("visionzip", "random", "pool")}
        config.sweep.controls = ("random",)
    config.candidates = ConfigDict(candidates)
    return config.lock()

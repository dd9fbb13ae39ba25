"""What do training-free reducers lose on one trained system, beside a connector that is trained for the budget?"""

from ml_collections import ConfigDict

from configs.sweeps import digits_token_budget

KINDS = ("visionzip", "divprune", "fastv", "random", "uniform_stride")


def get_config(arg: str = "") -> ConfigDict:
    """One system is trained; reducers at 1, 4 and 8 of its 16 tokens are evaluated on it, pooling is trained as well.

    Args:
      arg: "" for the sweep; `small` for a few minutes of it; `smoke` for a few steps and three points.
    """
    config = digits_token_budget.get_config(arg)
    config.unlock()
    # All stages are shared, so that a candidate without a schedule trains nothing.
    config.sweep.shared = config.base.schedule
    candidates = {"none": {"budgets": (16,)}}
    candidates |= {kind: {"budgets": (1, 4, 8), "reducer": {"kind": kind}} for kind in KINDS}
    candidates["pool"] = {"budgets": (1, 4, 8), "connector": {"kind": "pool"}, "schedule": ("instruction",)}
    config.sweep.controls = ("random", "uniform_stride")
    if arg == "smoke":
        candidates = {name: candidates[name] | {"budgets": (4,)} for name in ("visionzip", "random", "pool")}
        config.sweep.controls = ("random",)
    config.candidates = ConfigDict(candidates)
    return config.lock()

r"""What do training-free reducers lose on a release, on questions of your own?

Nothing is trained:

    python -m vlm_jax.cli.sweep --config=configs/sweeps/release_reducers.py --workdir=sweep \
        --config.base.release=llava-hf/llava-1.5-7b-hf --config.base.data.evaluation_path=evaluation.jsonl
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import finetune

KINDS = ("visionzip", "divprune", "fastv", "random", "uniform_stride")


def get_config(arg: str = "") -> ConfigDict:
    """The release as it is, and reducers at 16 and 64 tokens; `smoke` is a small model of digits, trained for them."""
    base = finetune.get_config(arg)
    base.unlock()
    budgets, released = ((4,), 16) if arg == "smoke" else ((16, 64), None)
    if arg != "smoke":
        base.schedule, base.stages = (), ConfigDict()
        base.data = ConfigDict({**base.data.to_dict(), "train_path": placeholder(str)})
    candidates = {kind: {"budgets": budgets, "reducer": {"kind": kind}} for kind in KINDS}
    if arg == "smoke":
        candidates = {"fastv": candidates["fastv"]}
    config = ConfigDict({"base": base, "candidates": {"none": {"budgets": (released,)}, **candidates}})
    controls = tuple(kind for kind in ("random", "uniform_stride") if kind in candidates)
    config.sweep = ConfigDict({"shared": base.schedule, "controls": controls})
    return config.lock()

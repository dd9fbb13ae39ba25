r"""What do training-free reducers lose on a release, on questions of your own?

Nothing is trained:

    python -m vlm_jax.cli.sweep --config=configs/sweeps/release_reducers.py --workdir=sweep \
        --config.base.release=llava-hf/llava-1.5-7b-hf --config.base.data.evaluation_path=evaluation.jsonl

One method with the settings of its paper (`configs/papers.py`): `--config=configs/sweeps/release_reducers.py:fastv`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import finetune
from configs.papers import PAPERS, VIDEOS

KINDS = ("visionzip", "divprune", "fastv", "random", "uniform_stride")


def get_config(arg: str = "") -> ConfigDict:
    """The release as it is, and reducers at 16 and 64 tokens.

    Args:
      arg: "" for these; a method of `PAPERS` for that one with its paper's settings; `smoke` for a small model of
        digits, trained for them.
    """
    if arg not in ("", "smoke", *PAPERS):
        raise ValueError(f"this config takes smoke or a method ({', '.join(PAPERS)}), not '{arg}'")
    base = finetune.get_config("smoke" if arg == "smoke" else "")
    base.unlock()
    if arg in VIDEOS:
        base.release = VIDEOS[arg]
        base.row.pictures = 1  # a video, in whose frames these act
    budgets, released = ((4,), 16) if arg == "smoke" else ((16, 64), None)
    if arg != "smoke":
        base.schedule, base.stages = (), ConfigDict()
        base.data = ConfigDict({**base.data.to_dict(), "train_path": placeholder(str)})
    candidates = {kind: {"budgets": budgets, "reducer": {"kind": kind}} for kind in KINDS}
    if arg == "smoke":
        candidates = {"fastv": candidates["fastv"]}
    candidates = PAPERS.get(arg, candidates)
    config = ConfigDict({"base": base, "candidates": {"none": {"budgets": (released,)}, **candidates}})
    controls = tuple(kind for kind in ("random", "uniform_stride") if kind in candidates)
    config.sweep = ConfigDict({"shared": base.schedule, "controls": controls})
    return config.lock()

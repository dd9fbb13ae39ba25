"""Qwen-VL's resampler alone, its sin-cos tables, and tables at another size."""

import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.checkpoints.maps.qwen_vl import resampler_rules
from vlm_jax.checkpoints.params import import_params
from vlm_jax.checkpoints.rules import prefixed
from vlm_jax.connectors.resampler import Resampler
from vlm_jax.layers.position_embedding import sincos_2d
from vlm_jax.layers.resize import resize
from vlm_jax.types import VisualFeatures

TOWERS_OWN = ("post_norm", "projection")  # after the official class, in the class of the tower


def resampled(folder: Path, case: str, settings: dict, x: np.ndarray) -> jax.Array:
    """The output of one case of the config."""
    width, side = settings["embed_dim"], math.isqrt(x.shape[1])
    connector = Resampler(width, settings["grid_size"] ** 2, settings["num_heads"], released=True)
    features = VisualFeatures(jnp.asarray(x), jnp.ones(x.shape[:2], bool), (side, side))
    drawn = connector.init(jax.random.key(0), features, deterministic=True)["params"]
    shapes = {name: tree for name, tree in drawn.items() if name not in TOWERS_OWN}
    tensors = {key: tensor for key, tensor in open_checkpoint(folder).items() if key.startswith(f"{case}.")}
    params = import_params(prefixed(resampler_rules(width), f"{case}."), tensors, shapes)
    apply = functools.partial(
        connector.apply, deterministic=True, capture_intermediates=lambda part, _: part.name == "attention"
    )
    _, state = jax.jit(apply)({"params": {**drawn, **params}}, features)
    return state["intermediates"]["attention"]["__call__"][0][0]


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_y` of the config's cases, `abs_<from>_<to>_out` and `sincos_<width>_<side>`."""
    found, expected = {}, comparison.read(folder).expected
    for case, settings in json.loads((folder / "config.json").read_text()).items():
        found[f"{case}_y"] = resampled(folder, case, settings, inputs[f"{case}_x"])
    for name in expected:
        if sizes := re.fullmatch(r"abs_(\d+)_(\d+)_out", name):
            before, after = map(int, sizes.groups())
            table = jnp.asarray(inputs[name.replace("_out", "_in")]).reshape(before, before, -1)
            found[name] = resize(table, (after, after), "bicubic").reshape(after**2, -1)
        elif sizes := re.fullmatch(r"sincos_(\d+)_(\d+)", name):
            width, side = map(int, sizes.groups())
            found[name] = sincos_2d((side, side), width, last=False)
    return {name: np.asarray(array) for name, array in found.items()}

"""MobileVLM's projectors alone: every case of the folder's config, under its released names."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.checkpoints.params import import_params
from vlm_jax.pretrained.projector import mm_projector
from vlm_jax.types import VisualFeatures


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_y` of `<case>_x`, features of a square grid."""
    found, checkpoint = {}, open_checkpoint(folder)
    for case, settings in json.loads((folder / "config.json").read_text()).items():
        start = f"{case}.model.mm_projector"
        connector, rules = mm_projector(settings["mm_projector_type"], settings["hidden_size"], case, source=start)
        x = jnp.asarray(inputs[f"{case}_x"])
        features = VisualFeatures(x, jnp.ones(x.shape[:2], bool), (settings["grid"],) * 2)
        shapes = jax.eval_shape(functools.partial(connector.init, deterministic=True), jax.random.key(0), features)[
            "params"
        ]
        tensors = {key: tensor for key, tensor in checkpoint.items() if key.startswith(f"{start}.")}
        params = import_params(rules, tensors, shapes)
        apply = jax.jit(functools.partial(connector.apply, deterministic=True))
        found[f"{case}_y"] = np.asarray(apply({"params": params}, features).tokens)
    return found

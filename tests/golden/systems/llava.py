"""LLaVA's vision tower, at several scales where the config asks for them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import vlm_jax

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own
NOT_COMPARED = {"image_features": "the projector's output; the tower's own output is compared as `tower`"}


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tower's features of the folder's image."""
    config = json.loads((folder / "config.json").read_text())
    tower = json.loads((folder / "vision_tower_config.json").read_text())
    ours = vlm_jax.from_pretrained(folder, config={**config, "vision_tower_config": tower})
    mean, std = (jnp.asarray(values)[None, None, None] for values in (MEAN, STD))
    pixels = (jnp.asarray(inputs["image_u8"], jnp.float32) / 255 - mean) / std
    return {"tower": np.asarray(jax.jit(ours.apply)(pixels).tokens)}

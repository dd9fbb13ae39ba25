"""Qwen-VL's ViT and resampler, at the size of its position table and at others."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import from_pretrained
from vlm_jax.layers.position_embedding import sincos_2d

# The release's image transform.
MEAN = np.asarray([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.asarray([0.26862954, 0.26130258, 0.27577711], np.float32)


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Every output array that the folder's manifest names."""
    manifest = json.loads((folder / "golden.json").read_text())["arrays"]
    loaded = from_pretrained(folder)
    module, connector = loaded.module, loaded.module.connector

    @jax.jit
    def run(params, images):
        features = module.encoder.apply({"params": params["encoder"]}, images)
        tokens = connector.apply({"params": params["connector"]}, features, deterministic=True)
        return features.tokens.mean(1), tokens.tokens

    found = {}
    for name, array in inputs.items():
        prefix = re.fullmatch(r"(px\d+)_image_u8", name).group(1)
        images = jnp.asarray((array.astype(np.float32) / 255 - MEAN) / STD)
        mean, tokens = run(loaded.params, images)
        step = tokens.shape[1] // manifest[f"{prefix}_features"]["shape"][1]
        found |= {f"{prefix}_tower_mean": mean, f"{prefix}_features": tokens[:, ::step]}
    side = int(connector.num_queries**0.5)
    found["pos_embed"] = sincos_2d((side, side), connector.features, last=False)
    return found

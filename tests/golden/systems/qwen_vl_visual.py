"""Qwen-VL's ViT and resampler, at the size of its position table and at others, its image transform, and Qwen."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from tests.golden.comparison import step
from tests.golden.systems import qwen_vl_language
from tests.golden.systems.pixels import CLIP, normalised
from vlm_jax import from_pretrained
from vlm_jax.layers.position_embedding import sincos_2d
from vlm_jax.processors.image import to_picture
from vlm_jax.processors.pixels import Pixels


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Every array that the folder's manifest names."""
    manifest = json.loads((folder / "golden.json").read_text())["arrays"]
    loaded = from_pretrained(folder)
    module, connector = loaded.module, loaded.module.connector

    @jax.jit
    def run(params, images):
        features = module.encoder.apply({"params": params["encoder"]}, images, collect=True)
        tokens, state = connector.apply(
            {"params": params["connector"]},
            features,
            deterministic=True,
            capture_intermediates=lambda part, _: part.name in ("attention", "post_norm"),
        )
        parts = state["intermediates"]
        return {
            "ln_pre": features.hidden[0],
            **{f"block{i}": state for i, state in enumerate(features.hidden[1:])},
            "last": features.tokens,
            "tower_mean": features.tokens.mean(1),
            "resampler": parts["attention"]["__call__"][0][0],
            "ln_post": parts["post_norm"]["__call__"][0],
            "features": tokens.tokens,
        }

    def shown(name: str, array: jax.Array) -> jax.Array:
        """The images and the tokens that the folder holds: the first ones, and one in every so many of them."""
        array = array[: manifest[name]["shape"][0]]
        return array if array.ndim == 2 else array[:, :: step(manifest[name])]

    found = {}
    for name, array in inputs.items():
        if match := re.fullmatch(r"(\D+\d+)_image_u8", name):
            arrays = run(loaded.params, normalised(array, CLIP))
            named = {f"{match.group(1)}_{part}": array for part, array in arrays.items()}
            found |= {name: shown(name, array) for name, array in named.items() if name in manifest}
    if "png_features" in manifest:
        side = loaded.config["visual"]["image_size"]
        pictures = {
            path.name: Pixels(*CLIP).tiles([Pixels().resized(to_picture(path), (side, side))])[0]
            for path in sorted(folder.glob("*.png"))
        }
        found |= {
            f"png_{Path(name).stem}_pixel_values": picture.transpose(2, 0, 1) for name, picture in pictures.items()
        }
        found["png_features"] = run(loaded.params, jnp.asarray(np.stack(list(pictures.values()))))["features"]
        found |= qwen_vl_language.outputs(comparison.read(folder), loaded, pictures)
    side = int(connector.num_queries**0.5)
    found["pos_embed"] = sincos_2d((side, side), connector.features, last=False)
    return {name: array for name, array in found.items() if name in manifest}

"""LLaVA and MobileVLM: CLIP, at several scales where the config asks for them, and the projector.

A projector is given the official pixels, which some folders list as outputs of the image processor.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import vlm_jax
from tests.golden import comparison
from tests.golden.systems.pixels import CLIP, normalised

PROCESSOR = "the image processor's resize, padding and tiles; the model is given these pixels"
LANGUAGE = "the language model, which the package does not load so far"
NOT_COMPARED = {
    r"(img\d+_)?pixel_values|pre\d+_pad": PROCESSOR,
    r"(img\d+|single)_(merged|spatial|flat)": "layout: unpadding of tiles and image_newline, a processor's task",
    r"batch_(left|right)_(mask|position_ids|labels)|truncated_embeds": "layout of a batch of prompts, as above",
    r".*_logits|.*_loss|.*_greedy": LANGUAGE,
}


def load(folder: pathlib.Path):
    """The folder's checkpoint, with the tower's config, which a release names and does not hold."""
    config = json.loads((folder / "config.json").read_text())
    tower = json.loads((folder / "vision_tower_config.json").read_text())
    return vlm_jax.from_pretrained(folder, config={**config, "vision_tower_config": tower})


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tower's features and the projector's tokens that the folder's manifest names."""
    expected = comparison.read(folder).expected
    ours, found = load(folder), {}
    tokens = jax.jit(lambda x: ours.apply(x).tokens)
    if "pixel_values" in expected:
        found["image_features"] = tokens(jnp.asarray(expected["pixel_values"].transpose(0, 2, 3, 1)))
    elif "tower" in expected:
        images = inputs["image_u8" if "image_u8" in inputs else "images_u8"]
        pixels, encoder = normalised(images, CLIP), ours.module.encoder
        tower = jax.jit(lambda p, x: encoder.apply({"params": p}, x).tokens)
        found["tower"] = tower(ours.params["encoder"], pixels[: len(expected["tower"])])
        found["image_features"] = tokens(pixels[: len(expected["image_features"])])
    for name in expected:
        if name.endswith("_encoded"):
            tiles = expected[name.replace("_encoded", "_pixel_values")].transpose(0, 2, 3, 1)
            found[name] = tokens(normalised(tiles, CLIP))
    return {name: np.asarray(value) for name, value in found.items()}

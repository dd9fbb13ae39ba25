"""LLaVA and MobileVLM: CLIP, at several scales where the config asks for them, the projector and Llama.

The model is given the official pixels, which some folders list as outputs of the image processor.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import vlm_jax
from tests.golden import comparison
from tests.golden.systems import llava_language, llava_processor
from tests.golden.systems.pixels import CLIP, normalised


def load(folder: pathlib.Path):
    """The folder's checkpoint, with the tower's config, which a release names and does not hold."""
    config = json.loads((folder / "config.json").read_text())
    tower = json.loads((folder / "vision_tower_config.json").read_text())
    return vlm_jax.from_pretrained(folder, config={**config, "vision_tower_config": tower})


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tower's features, the projector's tokens, and what follows from them in the folder's prompts."""
    golden = comparison.read(folder)
    expected = golden.expected
    ours, found = load(folder), llava_processor.outputs(golden)
    tokens = jax.jit(lambda x: ours.apply(x, method="visual_tokens").tokens)
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
    if ours.module.decoder is not None:
        found |= llava_language.outputs(golden, ours)
    return {name: np.asarray(value) for name, value in found.items()}

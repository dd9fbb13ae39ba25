"""MobileVLM's CLIP, which its release stores under LLaVA's names."""

import pathlib

import jax
import numpy as np

from tests.golden.systems.llava import LANGUAGE, load
from tests.golden.systems.pixels import CLIP, normalised

NOT_COMPARED = {
    "image_features": "the projector, which the package does not load so far",
    r"pre\d+_pad": "the image processor's padding, resize and crop",
    r".*_logits|.*_loss|.*_greedy": LANGUAGE,
}


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tower's features of the first image."""
    ours = load(folder)
    return {"tower": np.asarray(jax.jit(ours.apply)(normalised(inputs["images_u8"][:1], CLIP)).tokens)}

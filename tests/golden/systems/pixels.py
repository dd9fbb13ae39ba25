"""Normalised pixels, as the released processors give them."""

import jax
import jax.numpy as jnp
import numpy as np

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]

CLIP: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def normalised(images: np.ndarray, statistics: Statistics) -> jax.Array:
    """(x / 255 - mean) / std of uint8 images, channels last."""
    mean, std = (jnp.asarray(values)[None, None, None] for values in statistics)
    return (jnp.asarray(images, jnp.float32) / 255 - mean) / std

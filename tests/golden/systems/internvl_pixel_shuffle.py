"""InternVL's pixel_shuffle alone, in both versions, with the factors that the shapes tell."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from vlm_jax.connectors.pixel_shuffle import shuffle
from vlm_jax.types import VisualFeatures


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`y<case>_<version>` of `x<case>` [images, rows, columns, channels]."""
    found = {}
    for name, expected in comparison.read(folder).expected.items():
        case, version = re.fullmatch(r"y(\d+)_(v\d)", name).groups()
        x = inputs[f"x{case}"]
        factor = round((expected.shape[-1] / x.shape[-1]) ** 0.5)
        flat = jnp.asarray(x.reshape(len(x), -1, x.shape[-1]))
        features = VisualFeatures(flat, jnp.ones(flat.shape[:2], bool), x.shape[1:3])
        rows, cols = x.shape[1] // factor, x.shape[2] // factor
        grid = (rows, cols) if version == "v2" else (cols, rows)
        found[name] = np.asarray(shuffle(features, factor, version)[0]).reshape(len(x), *grid, -1)
    return found

"""Ovis 2.5's sizes and patches."""

import pathlib
import re

import numpy as np
from PIL import Image

from tests.golden import comparison
from tests.golden.systems.pixels import HALF
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.smart_resize import ovis_size
from vlm_jax.types import PatchFormat


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`smart_resize.table`, whose first columns are its inputs, and the patches of images by their grids' meaning."""
    golden, found = comparison.read(folder), {}
    rows = []
    for height, width, factor, least, most, *_ in golden.expected["smart_resize.table"].tolist():
        size = ovis_size((height, width), factor, least, most)
        rows.append([height, width, factor, least, most, *size, size[0] * size[1] // factor**2])
    found["smart_resize.table"] = np.array(rows)
    for name, array in inputs.items():
        stem = name.removesuffix(".u8")
        meaning = golden.entries[f"{stem}.grid_thw"]["meaning"]
        patch, stride, *limits = map(int, re.search(
            r"patch (\d+), stride (\d+), min (\d+)\*(\d+), max (\d+)\*(\d+)", meaning).groups())  # fmt: skip
        views = NativeViews(
            Pixels(*HALF, Image.Resampling.BILINEAR),
            PatchFormat(patch, 1, stride),
            ovis_size,
            limits[0] * limits[1],
            limits[2] * limits[3],
        )
        (seen,) = views.images([Image.fromarray(array)])
        found[f"{stem}.grid_thw"] = np.array([seen.grid])
        levels = (seen.pixels * 0.5 + 0.5) * 255  # of (level / 255 - 0.5) / 0.5
        found[f"{stem}.patches_u8"] = np.rint(levels).astype(np.uint8)
    return found

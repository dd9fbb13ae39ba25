"""InternVL's tiles: the grid for a size, and the tiles of pictures."""

import pathlib
import re

import numpy as np
from PIL import Image

from tests.golden import comparison
from tests.golden.systems.pixels import IMAGENET
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.tiles import InternVLViews


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`grid_table`, whose first columns are its inputs, and `<image>_tiles` by the settings of their meaning."""
    golden, found = comparison.read(folder), {}
    side = int(re.search(r"image_size (\d+)", golden.entries["grid_table"]["meaning"]).group(1))
    rows = []
    for width, height, least, most, thumbnail, *_ in golden.expected["grid_table"].tolist():
        views = InternVLViews(Pixels(*IMAGENET), side, 1, least, most, bool(thumbnail))
        grid = views.grid((height, width))
        (layout,) = views.layouts([(height, width)])  # one token a tile
        rows.append([width, height, least, most, thumbnail, grid[1], grid[0], len(layout)])
    found["grid_table"] = np.array(rows)
    for name, array in inputs.items():
        stem = name.removesuffix("_u8")
        meaning = golden.entries[f"{stem}_tiles"]["meaning"]
        side, least, most = map(int, re.search(r"image_size (\d+), min (\d+), max (\d+)", meaning).groups())
        views = InternVLViews(Pixels(*IMAGENET), side, 1, least, most, "thumbnail" in meaning)
        picture = Image.fromarray(array)
        found[f"{stem}_tiles"] = np.stack([np.asarray(tile) for tile in views.tiles(picture)])
        pixels = views.images([picture])[0].pixels.transpose(0, 3, 1, 2)
        found[f"{stem}_pixel_values"] = pixels[: len(golden.expected[f"{stem}_pixel_values"])]
    return found

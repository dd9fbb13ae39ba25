"""LLaVA's helper functions: canvases, their borders, and squares."""

import json
import pathlib
import re

import numpy as np
from PIL import Image

from tests.golden import comparison
from vlm_jax.pretrained.processing.llava import canvases
from vlm_jax.processors.anyres import AnyresViews, unpadded
from vlm_jax.processors.image import square_padded
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiling import best_resolution

SIDES = {"16": 336, "big": 384}  # of a tile, by the list's name


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The table of resolutions, `unpad<i>_out` by the sizes of its meaning, and the outputs for `pad<i>_u8`."""
    golden, found = comparison.read(folder), {}
    lists = list(json.loads((folder / "pinpoints.json").read_text()).items())
    rows = []
    for number, width, height, *_ in golden.expected["resolution_table"].tolist():
        name, pinpoints = lists[number]
        best = best_resolution((height, width), canvases(pinpoints, SIDES[name], name))
        rows.append([number, width, height, *best[::-1], *(side // SIDES[name] for side in best[::-1])])
    found["resolution_table"] = np.array(rows)
    for name, entry in golden.entries.items():
        if not name.startswith("unpad"):
            continue
        *shape, width, height = map(int, re.findall(r"\d+", entry["meaning"].partition(" as ")[2]))
        values = np.arange(np.prod(shape)).reshape(shape)
        found[name] = unpadded(values.transpose(1, 2, 0), (height, width), rounded=False).transpose(2, 0, 1)
    for name, array in inputs.items():
        stem, picture = name.removesuffix("_u8"), Image.fromarray(array)
        width, height = map(int, re.findall(r"\d+", golden.entries[f"{stem}_out"]["meaning"])[:2])
        side = min(width, height) // 2
        views = AnyresViews(SquareViews(Pixels(), (side, side), 1, "crop"), (1, 1), ((height, width),), side)
        found[f"{stem}_out"] = np.asarray(views.canvas(picture))
        found[f"{stem}_tiles"] = np.stack([np.asarray(tile) for tile in views.tiles(picture)[1:]])
        colour = re.search(r"background \((\d+),(\d+),(\d+)\)", golden.entries[f"{stem}_square"]["meaning"])
        found[f"{stem}_square"] = np.asarray(square_padded(picture, tuple(map(int, colour.groups()))))
    return found

"""Ovis 2's choice of parts."""

import pathlib
import re

import numpy as np

from tests.golden import comparison
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.tiles import Ovis2Views


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`grid.table`, whose first columns are its inputs; the side is in its meaning."""
    del inputs
    golden = comparison.read(folder)
    side = int(re.search(r"side (\d+)", golden.entries["grid.table"]["meaning"]).group(1))
    rows = []
    for width, height, most, *_ in golden.expected["grid.table"].tolist():
        views = Ovis2Views(Pixels(), side, 1, most)  # one token for a part, as the release's placeholders have it
        grid = views.grid((height, width))
        rows.append([width, height, most, *grid, len(views.layout(grid))])
    return {"grid.table": np.array(rows)}

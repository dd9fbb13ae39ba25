"""Which part of a picture each visual token is computed from, for the views of any system."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.views import Tiles, Views
from vlm_jax.types import Grid

LEVELS = 255.0
EDGE = 2  # pixels of a tile's border that resampling may have clamped


class Line(NamedTuple):
    """Where a tile's pixels are in the picture along one axis: `start + step * pixel`, in sides of the picture."""

    start: float
    step: float


def token_boxes(views: Views, size: Size, patches: Grid, tokens: Grid) -> Float[np.ndarray, "n 4"]:
    """The box of every visual token of an image before a reducer, tile after tile, in row-major order.

    Args:
      views: of a system without a reducer.
      size: (height, width) of the picture, in pixels.
      patches: rows and columns of the encoder's features of a tile; unused at native resolution.
      tokens: rows and columns of the tokens of a tile; unused at native resolution.

    Returns:
      (left, top, right, bottom) in pixels of the picture, float64; NaN for a token of padding alone.
    """
    if isinstance(views, NativeViews):
        found = []
        for (top, left, bottom, right), (rows, cols) in views.regions(size):
            down, across = _edges(rows, rows), _edges(cols, cols)
            found.append(_boxes(top + (bottom - top) * down, left + (right - left) * across, size))
        return np.concatenate(found)
    assert isinstance(views, Tiles)
    rows, cols = (_edges(*counts) for counts in zip(patches, tokens, strict=True))
    height, width = views.tile_shape[:2]
    found = []
    for down, across in _lines(views, size):
        of_rows, of_cols = (
            line.start + line.step * side * shares
            for line, side, shares in ((down, height, rows), (across, width, cols))
        )
        found.append(_boxes(of_rows, of_cols, size))
    return np.concatenate(found)


def _edges(patches: int, tokens: int) -> Float[np.ndarray, "m"]:
    """The limits of the tokens along one axis of a tile, as shares of its side; as `behind_connector.block_means`."""
    side = -(-patches // tokens)
    steps = np.arange(tokens + 1)
    if -(-patches // side) == tokens:
        return np.minimum(steps * side, patches) / patches
    return -(-steps * patches // tokens) / patches


def _boxes(rows: Float[np.ndarray, "r"], cols: Float[np.ndarray, "c"], size: Size) -> Float[np.ndarray, "n 4"]:
    """The boxes between limits, which are shares of the picture's sides."""
    rows, cols = np.clip(rows, 0, 1) * size[0], np.clip(cols, 0, 1) * size[1]
    found = np.asarray(
        [
            (left, top, right, bottom)
            for top, bottom in itertools.pairwise(rows.tolist())
            for left, right in itertools.pairwise(cols.tolist())
        ]
    )
    hidden = (found[:, 2] - found[:, 0] < 1e-6) | (found[:, 3] - found[:, 1] < 1e-6)
    return np.where(hidden[:, None], np.nan, found)


def _lines(views: Tiles, size: Size) -> Iterator[tuple[Line, Line]]:
    """For every tile, where its rows and its columns are in the picture.

    The views prepare four pictures of that size: one whose values are the rows, one whose values are the columns, a
    black and a white one. The last two give the range of a pixel's values, which is empty in padding. So resizing,
    cropping, padding and tiling need no second description.
    """
    height, width = size
    rows = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], size)
    cols = np.broadcast_to(((np.arange(width) + 0.5) / width)[None], size)
    down, across, black, white = (_tiles(views, value) for value in (rows, cols, np.zeros(size), np.ones(size)))
    for tile in range(len(black)):
        extent = white[tile] - black[tile]
        shown = extent > 0.99 * max(float(extent.max()), 1e-6)
        scale = np.where(shown, extent, 1)
        yield (
            _line((down[tile] - black[tile]) / scale, shown),
            _line(((across[tile] - black[tile]) / scale).T, shown.T),
        )


def _tiles(views: Tiles, values: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "tiles rows cols"]:
    """The first channel of the tiles of a grey picture with values from 0 to 1."""
    picture = Image.fromarray(np.rint(values * LEVELS).astype(np.uint8))
    (prepared,) = views.images([picture if views.channels == 1 else picture.convert("RGB")])  # type: ignore[attr-defined]
    return prepared.pixels[..., 0].astype(np.float64)


def _line(values: Float[np.ndarray, "n m"], shown: np.ndarray) -> Line:
    """The least-squares line through the means of rows, without those at the border of what is shown."""
    places = np.flatnonzero(shown.any(axis=1))
    if not len(places):
        return Line(-1.0, 0.0)
    if len(places) > 4 * EDGE:
        places = places[EDGE:-EDGE]
    means = np.asarray([values[place][shown[place]].mean() for place in places])
    if len(places) == 1:
        return Line(float(means[0]), 0.0)
    step, start = np.polyfit(places + 0.5, means, 1)
    return Line(float(start), float(step))

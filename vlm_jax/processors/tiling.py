"""The tile grids that systems choose from an image's size.

Sizes and grids are (height, width) and (rows, columns) here; releases list candidates as (width, height).
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

from vlm_jax.types import Grid

Size = tuple[int, int]
Order = Literal["release", "port"]


def best_resolution(size: Size, candidates: Sequence[Size]) -> Size:
    """The candidate that keeps most of an image's pixels, then has the least padding, then comes first.

    Args:
      size: of the image, in pixels.
      candidates: sizes of the canvases, in pixels.

    Source: LLaVA, mm_utils.py, select_best_resolution; DeepSeek-VL2, processing_deepseek_vl_v2.py, has the same.
    """
    height, width = size

    def rank(candidate: Size) -> tuple[int, int]:
        rows, cols = candidate
        scale = min(cols / width, rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return -kept, rows * cols - kept

    return min(candidates, key=rank)


@functools.cache
def ratio_candidates(min_tiles: int, max_tiles: int, order: Order) -> tuple[Grid, ...]:
    """Grids of min_tiles to max_tiles tiles, fewest tiles first.

    Args:
      min_tiles, max_tiles: of a grid.
      order: order of grids with equally many tiles, for ties: `port` by columns, then rows;
        `release` as CPython iterates over a set of (columns, rows).

    Source: InternVL, dynamic_preprocess; transformers, get_all_supported_aspect_ratios.
    """
    counts = range(1, max_tiles + 1)
    if order == "release":
        pairs = set(
            (i, j)
            for n in range(min_tiles, max_tiles + 1)
            for i in range(1, n + 1)
            for j in range(1, n + 1)
            if min_tiles <= i * j <= max_tiles
        )
    else:
        pairs = [(cols, rows) for cols in counts for rows in counts if min_tiles <= cols * rows <= max_tiles]
    return tuple((rows, cols) for cols, rows in sorted(pairs, key=math.prod))


def closest_ratio(size: Size, candidates: Sequence[Grid], tile: Size) -> Grid:
    """The grid of tiles whose aspect ratio is closest to the image's.

    Among ties, a later candidate is chosen while the image has more than half of its pixels.

    Args:
      size: of the image, in pixels.
      candidates: grids, in the order of `ratio_candidates`.
      tile: size of a tile, in pixels.

    Source: InternVL, find_closest_aspect_ratio.
    """
    height, width = size
    aspect, nearest, best = width / height, math.inf, (1, 1)
    for rows, cols in candidates:
        distance = abs(aspect - cols / rows)
        larger = width * height > 0.5 * tile[0] * tile[1] * cols * rows
        if distance < nearest or (distance == nearest and larger):
            nearest, best = distance, (rows, cols)
    return best


def split(size: Size, grid: Grid) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of the parts of an image, row by row; the last ones include the remainder."""
    (height, width), (rows, cols) = size, grid
    tall, wide = height // rows, width // cols
    return [
        (
            col * wide,
            row * tall,
            width if col == cols - 1 else (col + 1) * wide,
            height if row == rows - 1 else (row + 1) * tall,
        )
        for row in range(rows)
        for col in range(cols)
    ]


def covering_grid(size: Size, side: int, max_parts: int, threshold: float = 0.9) -> Grid:
    """The grid of the fewest parts that keep more than `threshold` of the image's pixels in squares of `side` pixels.

    Args:
      size: of the image, in pixels.
      side: side of the square to which a larger part is shrunk.
      max_parts: maximum number of parts.
      threshold: share of the pixels; if no grid keeps as much, the one that keeps most is returned.

    Source: Ovis 2, modeling_ovis.py, preprocess_image, _get_best_grid.
    """
    area = size[0] * size[1]
    counts = range(1, max_parts + 1)
    grids = [(rows, cols) for rows in counts for cols in counts if rows * cols <= max_parts]
    kept = {grid: sum(_covered(part, side) for part in split(size, grid)) / area for grid in grids}
    good = [grid for grid in grids if kept[grid] > threshold]
    if good:
        return min(good, key=lambda grid: (math.prod(grid), -kept[grid]))
    return min(grids, key=lambda grid: (-kept[grid], math.prod(grid)))


def _covered(part: tuple[int, int, int, int], side: int) -> float:
    """Pixels of a part of an image after shrinking it into a square of `side` pixels."""
    left, top, right, bottom = part
    long, short = max(right - left, bottom - top), min(right - left, bottom - top)
    return short / long * side * side if long > side else float(long * short)

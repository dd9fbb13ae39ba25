"""Choices of tiles against what their definitions say of all candidates."""

import math

import numpy as np
import pytest

from vlm_jax.processors.tiling import best_resolution, closest_ratio, covering_grid, ratio_candidates, split

CANVASES = [(28, 56), (56, 28), (56, 56), (84, 28), (28, 84)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((10, 20), (28, 56)),  # nothing is lost on any; the least is wasted
        ((200, 100), (56, 28)),
        ((500, 500), (56, 56)),
        ((300, 900), (28, 84)),
        ((28, 28), (28, 56)),  # of two that waste as much, the first
    ],
)
def test_the_canvas_that_keeps_most_and_wastes_least(size, expected):
    assert best_resolution(size, CANVASES) == expected


def test_orders_of_candidates_differ_in_ties_alone():
    release, port = (ratio_candidates(1, 12, order) for order in ("release", "port"))
    assert sorted(release) == sorted(port) == [(r, c) for r in range(1, 13) for c in range(1, 13) if r * c <= 12]
    for candidates in (release, port):
        assert list(map(math.prod, candidates)) == sorted(map(math.prod, candidates))


def test_equally_close_grids_are_told_apart_by_pixels():
    candidates = ratio_candidates(1, 4, "port")
    # 1x1 and 2x2 have the same aspect: the larger needs more than half of its 4 * 100 pixels.
    assert closest_ratio((14, 14), candidates, (10, 10)) == (1, 1)
    assert closest_ratio((15, 15), candidates, (10, 10)) == (2, 2)
    assert closest_ratio((10, 31), candidates, (10, 10)) == (1, 3)


@pytest.mark.parametrize("size", [(7, 11), (100, 33), (5, 5)])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 1)])
def test_parts_are_a_partition(size, grid):
    covered = np.zeros(size, int)
    parts = split(size, grid)
    for left, top, right, bottom in parts:
        covered[top:bottom, left:right] += 1
    assert (covered == 1).all()
    assert len(parts) == math.prod(grid)
    # In reading order, and none but the last of a row or column is larger.
    assert parts == sorted(parts, key=lambda part: (part[1], part[0]))
    assert parts[0][2:] == (size[1] // grid[1], size[0] // grid[0])


def test_the_fewest_parts_that_keep_nine_tenths():
    assert covering_grid((20, 20), 20, 9) == (1, 1)
    # One part of 20 x 21 keeps 20/21 of each side, 90.7%; of 20 x 23 86.9% of one and 87.0% of the other.
    assert covering_grid((20, 21), 20, 9) == (1, 1)
    assert covering_grid((20, 23), 20, 9) == (1, 2)
    assert covering_grid((60, 20), 20, 9) == (3, 1)
    # Where no grid keeps as much, the one that keeps most.
    assert covering_grid((60, 20), 20, 2) == (2, 1)

"""Position tables against the written formula and under resizing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.layers.position_embedding import LearnedPositions2D, sincos_2d


def written_out(grid, dim, table_grid=None, temperature=10_000.0):
    """Entry by entry: sin x, cos x, sin y, cos y, a quarter of the width each."""
    rows, cols = grid
    full_rows, full_cols = table_grid or grid
    quarter = dim // 4
    table = np.zeros((rows * cols, dim))
    for row, col, i in np.ndindex(rows, cols, quarter):
        # The centre of a patch in the patches of the table.
        y, x = (row + 0.5) * full_rows / rows - 0.5, (col + 0.5) * full_cols / cols - 0.5
        omega = temperature ** (-i / (quarter - 1))
        place = table[row * cols + col]
        place[i], place[quarter + i] = np.sin(x * omega), np.cos(x * omega)
        place[2 * quarter + i], place[3 * quarter + i] = np.sin(y * omega), np.cos(y * omega)
    return table


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (1, 4)])
@pytest.mark.parametrize("table_grid", [None, (4, 6)])
def test_sincos_is_the_written_formula(grid, table_grid):
    got = sincos_2d(grid, 16, table_grid=table_grid)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, written_out(grid, 16, table_grid), atol=1e-6)
    hot = sincos_2d(grid, 8, table_grid=table_grid, temperature=50.0)
    np.testing.assert_allclose(hot, written_out(grid, 8, table_grid, 50.0), atol=1e-6)


def test_sincos_needs_a_multiple_of_four():
    with pytest.raises(ValueError, match="multiple of 4, got 10"):
        sincos_2d((2, 2), 10)


def learned(table_grid, table, grid):
    layer = LearnedPositions2D(table_grid, table.shape[-1])
    return np.asarray(layer.apply({"params": {"table": jnp.asarray(table, jnp.float32)}}, grid))


def test_learned_positions_are_the_table_at_the_grid_of_training():
    table = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    np.testing.assert_array_equal(learned((2, 3), table, (2, 3)), table)


@pytest.mark.parametrize("grid", [(8, 8), (2, 3), (4, 9), (1, 1)])
def test_a_constant_table_stays_constant(grid):
    table = np.tile(np.float32([1.5, -2.0]), (16, 1))
    got = learned((4, 4), table, grid)
    assert got.shape == (grid[0] * grid[1], 2)
    np.testing.assert_allclose(got, np.tile(table[:1], (len(got), 1)), atol=1e-5)


def test_a_plane_stays_a_plane_inside():
    """A cubic kernel reproduces what is linear, where it does not meet the edge."""
    rows, cols = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    table = np.stack([rows, cols], axis=-1).reshape(64, 2).astype(np.float32)
    got = learned((8, 8), table, (16, 16)).reshape(16, 16, 2)[5:11, 5:11]
    centres = (np.arange(5, 11) + 0.5) / 2 - 0.5
    expected = np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_table_is_drawn_for_its_grid():
    params = LearnedPositions2D((20, 30), 64).init(jax.random.key(0), (20, 30))
    table = nn.meta.unbox(params)["params"]["table"]
    assert table.shape == (600, 64)
    assert 0.12 < float(jnp.std(table)) < 0.13  # 1 / sqrt(64)

"""The arithmetic of token budgets against a search over every grid."""

from fractions import Fraction

import pytest

from vlm_jax.budget import InfeasibleBudget, grid_of_size, refuse, sizes_of_grids, squares_of_sizes

GRIDS = [(8, 8), (7, 5), (1, 6), (4, 8), (6, 3), (3, 3), (2, 12), (1, 1)]


def by_search(size, grid):
    """The grid of that size inside `grid` that stretches the aspect least, the flatter of two."""
    found = []
    for rows in range(1, grid[0] + 1):
        for cols in range(1, grid[1] + 1):
            stretch = Fraction(rows * grid[1], cols * grid[0])
            stretch = max(stretch, 1 / stretch)
            if rows * cols == size and stretch <= 2:
                found.append((stretch, rows, cols))
    return min(found)[1:] if found else None


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_grid_of_a_size_is_the_nearest_in_aspect(grid):
    expected = {size: by_search(size, grid) for size in range(-1, grid[0] * grid[1] + 3)}
    assert {size: grid_of_size(size, grid) for size in expected} == expected
    assert sizes_of_grids(grid) == [size for size, found in expected.items() if found]


def test_examples():
    assert grid_of_size(16, (8, 8)) == (4, 4)
    assert grid_of_size(2, (8, 8)) == (1, 2)  # a factor of two, the flatter
    assert grid_of_size(6, (3, 3)) == (2, 3)
    assert grid_of_size(5, (8, 8)) is None  # 1x5 is too far from a square
    assert grid_of_size(64, (4, 4)) is None  # inside the grid only
    assert grid_of_size(0, (4, 4)) is None


@pytest.mark.parametrize(
    ("budget", "feasible", "nearest"),
    [(5, {1, 4, 16}, "4 and 16"), (0, [1, 4], "1"), (20, (1, 16, 4), "16"), (3, [], "none")],
)
def test_a_refusal_says_what_why_and_what_else(budget, feasible, nearest):
    error = refuse("pool", budget, (8, 4), feasible, "reasons")
    assert isinstance(error, InfeasibleBudget)
    assert str(error) == (
        f"config.token_budget: pool cannot give {budget} tokens from a 8x4 grid, because reasons; "
        f"nearest feasible: {nearest}"
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("whole", [False, True])
def test_squares_of_sizes_takes_the_smallest_side_of_every_number(grid, whole):
    found = squares_of_sizes(grid, whole=whole)
    for side in range(1, max(grid) + 1):
        fits = grid[0] % side == 0 and grid[1] % side == 0
        number = len(range(0, grid[0], side)) * len(range(0, grid[1], side))
        assert number in found or (whole and not fits)
        if number in found and (fits or not whole):
            assert found[number] <= side
    assert found[grid[0] * grid[1]] == 1

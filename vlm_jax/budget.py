"""Token budgets: the number of visual tokens, for which connectors and reducers are solved.

Pure Python, without arrays: this runs before parameters exist.
"""

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import TypeVar

from vlm_jax.types import Grid

Solved = TypeVar("Solved")


class InfeasibleBudget(ValueError):
    """A token budget that a kind cannot meet; the message has the nearest feasible ones."""


class InfeasibleGrid(ValueError):
    """A grid of features that a kind does not support; the message has the constraint and the fix."""


def refuse(kind: str, budget: int, grid: Grid, feasible: Iterable[int], why: str) -> InfeasibleBudget:
    """Creates the error for `budget`, with the nearest feasible budgets below and above.

    Args:
      kind: the connector's or reducer's name in its table.
      budget: the requested number of tokens.
      grid: (rows, columns) of the input features.
      feasible: every budget that the kind can meet on this grid.
      why: the constraint, as a clause.
    """
    below = max((b for b in feasible if b < budget), default=None)
    above = min((b for b in feasible if b > budget), default=None)
    nearest = " and ".join(str(b) for b in (below, above) if b is not None) or "none"
    return InfeasibleBudget(
        f"config.token_budget: {kind} cannot give {budget} tokens from a {grid[0]}x{grid[1]} grid, because "
        f"{why}; nearest feasible: {nearest}"
    )


def share(budget: int, views: Fraction, largest: int, solve: Callable[[int], Solved]) -> Solved:
    """Solves a budget for one of the `views` (tiles, frames) that share it equally.

    Args:
      budget: total tokens of all views.
      views: number of views; a fraction where one view covers several units of the budget.
      largest: largest budget of one view to try for suggestions.
      solve: solves the budget of a view, or raises InfeasibleBudget.

    Raises:
      InfeasibleBudget: the budget is not divisible, or a view cannot meet its part; has the nearest
        feasible budgets of all views.
    """
    part = budget / views
    if part.denominator == 1:
        try:
            return solve(int(part))
        except InfeasibleBudget as error:
            if views == 1:
                raise
            why = f"{part} for each of {views} views, which is not met ({error})"
    else:
        why = f"no equal parts for {views} views"

    def met(part: int) -> bool:
        try:
            solve(part)
        except InfeasibleBudget:
            return False
        return (part * views).denominator == 1

    smaller, larger = range(math.ceil(part) - 1, 0, -1), range(math.floor(part) + 1, max(largest, math.ceil(part)) + 1)
    found = (next((part * views for part in parts if met(part)), None) for parts in (smaller, larger))
    nearest = " and ".join(str(total) for total in found if total is not None) or "none"
    raise InfeasibleBudget(f"config.token_budget: {budget} tokens are {why}; nearest feasible: {nearest}")


def grid_of_size(size: int, grid: Grid) -> Grid | None:
    """The (rows, columns) with rows * columns == size that fits inside `grid`, nearest in aspect.

    The aspect ratio may change by at most a factor of two: 2 tokens of a square grid may be 1x2, while
    5 may not be 1x5. Among ties the one with fewer rows is chosen. Returns None when none fits.
    """
    if size < 1:
        return None
    rows, cols = grid
    candidates = [(r, size // r) for r in range(1, rows + 1) if size % r == 0 and size // r <= cols]
    changes = [(Fraction(r * cols, c * rows), r, c) for r, c in candidates]
    # Exact, whereas logarithms of a ratio and its inverse could differ in their last digit.
    near = min(((max(change, 1 / change), r, c) for change, r, c in changes), default=None)
    if near is None or near[0] > 2:
        return None
    return near[1:]


def sizes_of_grids(grid: Grid) -> list[int]:
    """Every size for which `grid_of_size` finds a grid, ascending."""
    return [size for size in range(1, grid[0] * grid[1] + 1) if grid_of_size(size, grid) is not None]


def solve_grid(kind: str, budget: int, grid: Grid) -> Grid:
    """`grid_of_size`, for a kind whose tokens may form any grid.

    Raises:
      InfeasibleBudget: no grid of that size fits.
    """
    found = grid_of_size(budget, grid)
    if found is None:
        why = "tokens must form a grid inside it of a similar aspect ratio"
        raise refuse(kind, budget, grid, sizes_of_grids(grid), why)
    return found


def squares_of_sizes(grid: Grid, *, whole: bool) -> dict[int, int]:
    """{number of squares: side} for every number of squares into which a grid can be divided, the largest first.

    Args:
      grid: (rows, columns) of features.
      whole: the side must divide both; else squares at the bottom and the right may be truncated, and of
        several sides with the same number the smallest is used.
    """
    sides = [s for s in range(1, max(grid) + 1) if not (whole and (grid[0] % s or grid[1] % s))]
    return {-(-grid[0] // s) * -(-grid[1] // s): s for s in reversed(sides)}

"""Token budgets: the one integer that every connector and reducer answers to.

Pure Python, no arrays: everything here runs before any parameter exists.
"""

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import TypeVar

from vlm_jax.types import Grid

Solved = TypeVar("Solved")


class InfeasibleBudget(ValueError):
    """A token budget that a kind cannot meet; the message names the nearest ones that it can."""


class InfeasibleGrid(ValueError):
    """A grid of features that a kind cannot take; the message names the constraint and the fix."""


def refuse(kind: str, budget: int, grid: Grid, feasible: Iterable[int], why: str) -> InfeasibleBudget:
    """Builds the error for `budget`, naming the nearest feasible budgets below and above.

    Args:
      kind: the connector's or reducer's name in its table.
      budget: the number of tokens that was asked for.
      grid: (rows, columns) of the features that it reduces.
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
    """Solves a budget for one of the `views` (tiles, frames) that have equal parts of it.

    Args:
      budget: tokens of all views together.
      views: how many they are; a fraction where one view covers several of what the budget is for.
      largest: up to which part of one view feasible ones are looked for.
      solve: gives whatever meets a view's part, or raises InfeasibleBudget.

    Raises:
      InfeasibleBudget: the budget has no equal parts, or a view cannot meet its own; names the nearest
        budgets of all views that can be met.
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

    Aspect may change by a factor of two at most: 2 tokens of a square grid may be 1x2, while
    5 may not be 1x5. Of two equally near ones the flatter wins. Returns None when none fits.
    """
    if size < 1:
        return None
    rows, cols = grid
    candidates = [(r, size // r) for r in range(1, rows + 1) if size % r == 0 and size // r <= cols]
    changes = [(Fraction(r * cols, c * rows), r, c) for r, c in candidates]
    # Exact, where two logarithms of one ratio and its inverse could differ in their last digit.
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
        why = "tokens must form a grid inside it of about its aspect"
        raise refuse(kind, budget, grid, sizes_of_grids(grid), why)
    return found


def squares_of_sizes(grid: Grid, *, whole: bool) -> dict[int, int]:
    """{number of squares: side} for every number of squares that a grid can be cut into, the largest first.

    Args:
      grid: (rows, columns) of features.
      whole: the side must divide both; else squares at the bottom and the right may be cut short, and of
        several sides that give the same number the smallest is meant.
    """
    sides = [s for s in range(1, max(grid) + 1) if not (whole and (grid[0] % s or grid[1] % s))]
    return {-(-grid[0] // s) * -(-grid[1] // s): s for s in reversed(sides)}

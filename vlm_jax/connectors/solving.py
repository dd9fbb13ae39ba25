"""The ways in which kinds meet a budget: each gives `num_tokens`, `token_grid` and `for_budget` to its kinds.

A kind names itself as in `CONNECTORS` by the class attribute `kind`, and holds the field that is solved.
"""

from typing import Any

from vlm_jax.budget import InfeasibleGrid, refuse, solve_grid, squares_of_sizes
from vlm_jax.types import Grid


class OutputGrid:
    """A chosen grid of tokens, of any size up to that of the features."""

    kind: str
    output_grid: tuple[int, int]

    def num_tokens(self, grid: Grid) -> int:
        """Rows times columns of `output_grid`, whatever the grid."""
        del grid
        return self.output_grid[0] * self.output_grid[1]

    def token_grid(self, grid: Grid) -> Grid | None:
        """`output_grid`, whatever the grid."""
        del grid
        return self.output_grid

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> dict[str, Any]:
        """The output grid of that size nearest in aspect to `grid`."""
        return {"output_grid": solve_grid(cls.kind, budget, grid)}


class WholeSquares:
    """Squares of factor x factor neighbours, which divide the grid."""

    kind: str
    factor: int

    def num_tokens(self, grid: Grid) -> int:
        """Squares of the grid.

        Raises:
          InfeasibleGrid: the factor does not divide both sides.
        """
        if grid[0] % self.factor or grid[1] % self.factor:
            raise InfeasibleGrid(
                f"{self.kind}: factor {self.factor} does not divide a {grid[0]}x{grid[1]} grid; choose an "
                f"image size that gives multiples of {self.factor} patches"
            )
        return grid[0] * grid[1] // self.factor**2

    def token_grid(self, grid: Grid) -> Grid | None:
        """Rows and columns of squares."""
        return grid[0] // self.factor, grid[1] // self.factor

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> dict[str, Any]:
        """The factor that leaves `budget` squares."""
        budgets = squares_of_sizes(grid, whole=True)
        if budget not in budgets:
            raise refuse(cls.kind, budget, grid, budgets, "a square's side must divide both sides")
        return {"factor": budgets[budget]}


class CoveringSquares:
    """Squares of factor x factor neighbours, those at the edges completed."""

    kind: str
    factor: int

    def num_tokens(self, grid: Grid) -> int:
        """Squares of the grid, those at its edges included."""
        return -(-grid[0] // self.factor) * -(-grid[1] // self.factor)

    def token_grid(self, grid: Grid) -> Grid | None:
        """Rows and columns of squares, those at the edges included."""
        return -(-grid[0] // self.factor), -(-grid[1] // self.factor)

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> dict[str, Any]:
        """The smallest factor that gives `budget` squares."""
        budgets = squares_of_sizes(grid, whole=False)
        if budget not in budgets:
            raise refuse(cls.kind, budget, grid, budgets, "squares of one side must cover it")
        return {"factor": budgets[budget]}


class Queries:
    """Learned queries, each of which becomes a token."""

    kind: str
    num_queries: int
    num_used: int | None

    def num_tokens(self, grid: Grid) -> int:
        """The number of queries that are used, whatever the grid."""
        del grid
        return self.num_used or self.num_queries

    def token_grid(self, grid: Grid) -> Grid | None:
        """None: a query has no place."""
        del grid
        return None

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> dict[str, Any]:
        """As many queries as tokens; every positive budget is feasible."""
        if budget < 1:
            raise refuse(cls.kind, budget, grid, [1], "it has one query at least")
        return {"num_queries": budget}

"""Mixins that solve a budget: each provides `num_tokens`, `token_grid` and `for_budget`.

A connector sets the class attribute `kind` to its key in `CONNECTORS`, and has the field that is solved.
"""

from vlm_jax.budget import InfeasibleGrid, refuse, solve_grid, squares_of_sizes
from vlm_jax.ranges import Natural, Side, Size
from vlm_jax.types import Fields, Grid


class OutputGrid:
    """Solves `output_grid`, of any size up to the feature grid."""

    kind: str
    output_grid: tuple[Size, Size]

    def num_tokens(self, grid: Grid) -> int:
        """Rows times columns of `output_grid` for any grid."""
        del grid
        return self.output_grid[0] * self.output_grid[1]

    def token_grid(self, grid: Grid) -> Grid | None:
        """`output_grid` for any grid."""
        del grid
        return self.output_grid

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> Fields:
        """The output grid of `budget` tokens whose aspect ratio is nearest to that of `grid`."""
        return {"output_grid": solve_grid(cls.kind, budget, grid)}


class WholeSquares:
    """Solves `factor`: squares of factor x factor neighbours, which divide the grid."""

    kind: str
    factor: Side

    def num_tokens(self, grid: Grid) -> int:
        """The number of squares in the grid.

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
    def for_budget(cls, budget: int, grid: Grid) -> Fields:
        """The factor that gives `budget` squares."""
        budgets = squares_of_sizes(grid, whole=True)
        if budget not in budgets:
            raise refuse(cls.kind, budget, grid, budgets, "a square's side must divide both sides")
        return {"factor": budgets[budget]}


class CoveringSquares:
    """Solves `factor`: squares of factor x factor neighbours, padded at the edges."""

    kind: str
    factor: Side

    def num_tokens(self, grid: Grid) -> int:
        """The number of squares in the grid, including those at the edges."""
        return -(-grid[0] // self.factor) * -(-grid[1] // self.factor)

    def token_grid(self, grid: Grid) -> Grid | None:
        """Rows and columns of squares, including those at the edges."""
        return -(-grid[0] // self.factor), -(-grid[1] // self.factor)

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> Fields:
        """The smallest factor that gives `budget` squares."""
        budgets = squares_of_sizes(grid, whole=False)
        if budget not in budgets:
            raise refuse(cls.kind, budget, grid, budgets, "squares of one side must cover it")
        return {"factor": budgets[budget]}


class Queries:
    """Solves `num_queries`: learned queries, each of which becomes a token."""

    kind: str
    num_queries: Size
    num_used: Natural | None

    def num_tokens(self, grid: Grid) -> int:
        """The number of used queries, for any grid."""
        del grid
        return self.num_used or self.num_queries

    def token_grid(self, grid: Grid) -> Grid | None:
        """None: queries have no position."""
        del grid
        return None

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> Fields:
        """As many queries as tokens; every positive budget is feasible."""
        if budget < 1:
            raise refuse(cls.kind, budget, grid, [1], "it has at least one query")
        return {"num_queries": budget}

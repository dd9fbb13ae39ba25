"""The third control: downscale the image."""

from typing import ClassVar

from vlm_jax.budget import grid_of_size, refuse, sizes_of_grids
from vlm_jax.ranges import Size
from vlm_jax.reducers.reducer import PassesFeatures
from vlm_jax.types import Fields, Grid


class DownsampleImage(PassesFeatures):
    """Resizes the image, on the host, to as many patches as the budget.

    On a release it is each tile that is resized, until the connector's tokens are as many (`pretrained.smaller_tile`,
    `processors.downsampled`); a picture of native resolution, until its tokens are no more.

    Attributes:
      output_grid: rows and columns of patches of the smaller image, solved from the budget.
    """

    kind: ClassVar[str] = "downsample_image"

    output_grid: tuple[Size, Size]

    @classmethod
    def for_budget(cls, budget: int, grid: Grid, num_layers: int) -> Fields:
        """The grid of `budget` patches whose aspect ratio is nearest to that of `grid`."""
        del num_layers
        output_grid = grid_of_size(budget, grid)
        if output_grid is None:
            why = "patches must form a grid inside it of a similar aspect ratio"
            raise refuse(cls.kind, budget, grid, sizes_of_grids(grid), why)
        return {"output_grid": output_grid}

    def image_size(self, height: int, width: int, grid: Grid) -> tuple[int, int]:
        """Height and width in pixels, each in proportion to the remaining patches."""
        return height * self.output_grid[0] // grid[0], width * self.output_grid[1] // grid[1]

    def reduced_grid(self, grid: Grid) -> Grid:
        """`output_grid` for any full-size grid."""
        del grid
        return self.output_grid

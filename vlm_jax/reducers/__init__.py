"""Training-free reducers: they meet the token budget before the connector, which then keeps it.

The contract, which `tests/contracts/test_reducers.py` holds every entry of `REDUCERS` to:

- `for_budget(budget, grid) -> dict`, a class method: the fields that leave `budget` features
  of a full-size image's `grid`, or `InfeasibleBudget`;
- `image_size(height, width, grid) -> (height, width)`: what the processor resizes images to;
- `reduced_grid(grid) -> Grid`: the grid that the connector meets, pure Python;
- `__call__(features, *, deterministic) -> VisualFeatures` of that grid.

`REDUCERS["none"]` is None: features pass as they are, and the connector meets the budget.
"""

from vlm_jax.reducers.downsample_image import DownsampleImage
from vlm_jax.reducers.random_drop import RandomDrop

REDUCERS = {"none": None, "random": RandomDrop, "downsample_image": DownsampleImage}

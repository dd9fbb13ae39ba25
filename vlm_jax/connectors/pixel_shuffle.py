"""InternVL's connector: squares of neighbours become one token of factor**2 times the width."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.budget import InfeasibleGrid, refuse
from vlm_jax.layers.mlp import Mlp
from vlm_jax.layers.norm import Norm
from vlm_jax.types import Grid, VisualFeatures, VisualTokens


class PixelShuffle(nn.Module):
    """Space to depth, LayerNorm, linear, GELU, linear.

    Attributes:
      features: the decoder's width D.
      factor: side of a square in features, solved from the budget; divides rows and columns.
      norm_epsilon: epsilon of the LayerNorm.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Chen et al. 2024 (InternVL 1.5), section 3.1; internvl_chat, modeling_internvl_chat.py.
    """

    features: int
    factor: int
    norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def num_tokens(self, grid: Grid) -> int:
        """Squares of the grid.

        Raises:
          InfeasibleGrid: the factor does not divide both sides.
        """
        if grid[0] % self.factor or grid[1] % self.factor:
            raise InfeasibleGrid(
                f"pixel_shuffle: factor {self.factor} does not divide a {grid[0]}x{grid[1]} grid; choose an "
                f"image size that gives multiples of {self.factor} patches"
            )
        return grid[0] * grid[1] // self.factor**2

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> dict[str, Any]:
        """The factor that leaves `budget` squares."""
        factors = [f for f in range(1, min(grid) + 1) if grid[0] % f == 0 and grid[1] % f == 0]
        budgets = {grid[0] * grid[1] // f**2: f for f in factors}
        if budget not in budgets:
            raise refuse("pixel_shuffle", budget, grid, budgets, "a square's side must divide both sides")
        return {"factor": budgets[budget]}

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # nothing is drawn
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        count = self.num_tokens(features.grid)
        batch = features.tokens.shape[0]
        rows, cols = (side // self.factor for side in features.grid)

        def squares(x):
            x = x.reshape(batch, rows, self.factor, cols, self.factor, -1).transpose(0, 1, 3, 2, 4, 5)
            return x.reshape(batch, count, -1)

        x = squares(jnp.where(features.mask[..., None], features.tokens, 0))
        x = Norm("layer", self.norm_epsilon, name="norm", **settings)(x)
        tokens = Mlp(self.features, "gelu", out_dim=self.features, name="mlp", **settings)(x)
        return VisualTokens(tokens, squares(features.mask).any(-1))

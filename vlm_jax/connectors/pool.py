"""Adaptive average pooling to a chosen grid, then a two-layer MLP."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlm_jax.budget import grid_of_size, refuse, sizes_of_grids
from vlm_jax.layers.mlp import Mlp
from vlm_jax.layers.neighbours import in_rows, masked
from vlm_jax.types import Grid, VisualFeatures, VisualTokens


def averaging_matrix(size_in: int, size_out: int) -> np.ndarray:
    """[size_out, size_in] float32 of zeros and ones: which inputs each output averages.

    Output i covers inputs floor(i * in / out) up to ceil((i + 1) * in / out), so that windows
    overlap where the sizes do not divide.

    Source: PyTorch, AdaptiveAvgPool2d.
    """
    index = np.arange(size_out)
    start, stop = index * size_in // size_out, -(-(index + 1) * size_in // size_out)
    columns = np.arange(size_in)
    return ((columns >= start[:, None]) & (columns < stop[:, None])).astype(np.float32)


class Pool(nn.Module):
    """Averages the features of every window of the grid that are not masked.

    Attributes:
      features: the decoder's width D.
      output_grid: rows and columns of the tokens, solved from the budget.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Yao et al. 2024 (DeCo), section 3.2; averaging as PyTorch's AdaptiveAvgPool2d.
    """

    features: int
    output_grid: tuple[int, int]
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def num_tokens(self, grid: Grid) -> int:
        """Rows times columns of `output_grid`, whatever the grid."""
        del grid
        return self.output_grid[0] * self.output_grid[1]

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> dict[str, Any]:
        """The output grid of that size nearest in aspect to `grid`."""
        output_grid = grid_of_size(budget, grid)
        if output_grid is None:
            why = "tokens must form a grid inside it of about its aspect"
            raise refuse("pool", budget, grid, sizes_of_grids(grid), why)
        return {"output_grid": output_grid}

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # nothing is drawn
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        features = in_rows(features, "pool")
        rows = averaging_matrix(features.grid[0], self.output_grid[0])
        cols = averaging_matrix(features.grid[1], self.output_grid[1])
        batch, _, width = features.tokens.shape
        mask = features.mask.reshape(batch, *features.grid)
        x = masked(features).reshape(batch, *features.grid, width)
        total = jnp.einsum("ir,jc,brcd->bijd", rows.astype(x.dtype), cols.astype(x.dtype), x)
        count = jnp.einsum("ir,jc,brc->bij", rows, cols, mask.astype(jnp.float32))
        mean = total / jnp.maximum(count, 1)[..., None].astype(x.dtype)
        tokens = mean.reshape(batch, -1, width)
        tokens = Mlp(self.features, "gelu", out_dim=self.features, name="mlp", **settings)(tokens)
        return VisualTokens(tokens, (count > 0).reshape(batch, -1))

"""The middle feature of every window of a grid, then a two-layer MLP."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlm_jax.connectors.solving import OutputGrid
from vlm_jax.layers.mlp import Mlp
from vlm_jax.layers.squares import in_rows
from vlm_jax.ranges import Size
from vlm_jax.types import Dtype, VisualFeatures, VisualTokens


class Middle(OutputGrid, nn.Module):
    """Takes the feature in the middle of every window of the grid, then linear, GELU, linear.

    Attributes:
      features: the decoder's width D.
      output_grid: rows and columns of the tokens, solved from the budget.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.
    """

    kind = "middle"

    features: Size
    output_grid: tuple[Size, Size]
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # no randomness
        features = in_rows(features, self.kind)
        places = [
            (2 * np.arange(out) + 1) * size // (2 * out)
            for size, out in zip(features.grid, self.output_grid, strict=True)
        ]
        index = (places[0][:, None] * features.grid[1] + places[1]).reshape(-1)
        mask = features.mask[:, index]
        middle = jnp.where(mask[..., None], features.tokens[:, index], 0)
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mlp = Mlp(self.features, "gelu", out_dim=self.features, name="mlp", **settings)
        return VisualTokens(mlp(middle), mask)

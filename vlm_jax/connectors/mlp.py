"""LLaVA's connector: an MLP on every feature, one token per feature."""

import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.budget import refuse
from vlm_jax.layers.mlp import Mlp
from vlm_jax.layers.squares import masked
from vlm_jax.ranges import Depth, Size
from vlm_jax.types import Dtype, Fields, Grid, VisualFeatures, VisualTokens


class MlpConnector(nn.Module):
    """linear, GELU, linear, feature by feature.

    | release | fields |
    |---|---|
    | LLaVA, DeepSeek-VL `linear` | depth 1 |
    | LLaVA-1.5, MobileVLM `mlp2x_gelu`, DeepSeek-VL `mlp_gelu` | depth 2, or the release's depth |
    | Prismatic, with two encoders | depth 3, first_dim four times the encoder's width |

    Attributes:
      features: the decoder's width D.
      depth: linear layers.
      first_dim: output width of the first of several layers; D when None.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Liu et al. 2023 (LLaVA), section 4.1, and (LLaVA-1.5), section 3.2; LLaVA,
    multimodal_projector/builder.py.
    """

    features: Size
    depth: Depth = 2
    first_dim: Size | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def num_tokens(self, grid: Grid) -> int:
        """The number of features."""
        return grid[0] * grid[1]

    def token_grid(self, grid: Grid) -> Grid | None:
        """The grid of the features."""
        return grid

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> Fields:
        """No field to solve; the budget must be the number of features."""
        if budget != grid[0] * grid[1]:
            raise refuse("mlp", budget, grid, [grid[0] * grid[1]], "it keeps every feature")
        return {}

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # no randomness
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        sizes = {"out_dim": self.features, "first_dim": self.first_dim, "depth": self.depth}
        mlp = Mlp(self.features, "gelu", name="mlp", **sizes, **settings)
        return VisualTokens(mlp(masked(features)), features.mask)

"""DeepSeek-VL's connector of two encoders: each is projected to half of the width, then an MLP is applied to both."""

import jax.numpy as jnp
from flax import linen as nn

from vlm_jax import axes
from vlm_jax.budget import InfeasibleGrid, refuse
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.mlp import ACTIVATIONS, Mlp
from vlm_jax.ranges import Depth, Size
from vlm_jax.types import Dtype, Fields, Grid, VisualFeatures, VisualTokens


class HybridMlp(nn.Module):
    """Concatenated linear projections of the high- and the low-resolution features, then (GELU, linear) repeated.

    It takes the output of `encoders.hybrid.Hybrid` with combine `tuple`, or the channels of both, high first,
    as with `feature`; without `first_dim`, the number of high channels, they are split in half.

    Attributes:
      features: the decoder's width D; the high-resolution half is the smaller one where D is odd.
      depth: number of linear layers, the first two projections counted as one.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Lu et al. 2024 (DeepSeek-VL), section 3.1; DeepSeek-VL, models/projector.py, MlpProjector,
    low_high_hybrid_split_mlp_gelu.
    """

    features: Size
    depth: Depth = 2
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def num_tokens(self, grid: Grid) -> int:
        """The number of features of one encoder."""
        return grid[0] * grid[1]

    def token_grid(self, grid: Grid) -> Grid | None:
        """The grid of the features."""
        return grid

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> Fields:
        """No field to solve; the budget must be the number of features."""
        if budget != grid[0] * grid[1]:
            raise refuse("hybrid_mlp", budget, grid, [grid[0] * grid[1]], "it keeps every feature")
        return {}

    @nn.compact
    def __call__(
        self, features: VisualFeatures | tuple[VisualFeatures, VisualFeatures], *, deterministic: bool
    ) -> VisualTokens:
        """Tokens, unmasked at positions where both encoders have a feature.

        Raises:
          InfeasibleGrid: the two encoders' grids differ.
        """
        del deterministic  # no randomness
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if isinstance(features, tuple):
            high, low = features
            if (high.grid, high.block) != (low.grid, low.block):
                raise InfeasibleGrid(
                    f"hybrid_mlp: expected the two encoders' features on one grid, got {high.grid[0]}x{high.grid[1]} "
                    f"(high) and {low.grid[0]}x{low.grid[1]} (low); change an encoder's image or patch size"
                )
            mask, parts = high.mask & low.mask, (high.tokens, low.tokens)
        else:
            cut = features.tokens.shape[-1] // 2 if features.first_dim is None else features.first_dim
            mask, parts = features.mask, jnp.split(features.tokens, [cut], axis=-1)
        half = self.features // 2
        projected = [
            Dense(width, (axes.CHANNELS_IN, axes.EMBED), name=name, **settings)(jnp.where(mask[..., None], x, 0))
            for name, width, x in zip(("high", "low"), (half, self.features - half), parts, strict=True)
        ]
        x = jnp.concatenate(projected, axis=-1)
        if self.depth > 1:
            mlp = Mlp(self.features, "gelu", out_dim=self.features, depth=self.depth - 1, name="mlp", **settings)
            x = mlp(ACTIVATIONS["gelu"](x))
        return VisualTokens(x, mask)

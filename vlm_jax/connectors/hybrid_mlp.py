"""DeepSeek-VL's connector of two encoders: each is projected to half of the width, then an MLP sees both."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from vlm_jax import axes
from vlm_jax.budget import InfeasibleGrid, refuse
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.mlp import ACTIVATIONS, Mlp
from vlm_jax.types import Grid, VisualFeatures, VisualTokens


class HybridMlp(nn.Module):
    """linear of the high-resolution features beside linear of the low-resolution ones, then (GELU, linear) again.

    It takes what `encoders.hybrid.Hybrid` gives with combine `tuple`, or the channels of both, high first,
    as with `feature`; features that do not say where the high ones end (`first_dim`) are cut in half.

    Attributes:
      features: the decoder's width D; the high-resolution half is the smaller one where D is odd.
      depth: linear layers one behind the other, the first ones counted as one.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Lu et al. 2024 (DeepSeek-VL), section 3.1; DeepSeek-VL, models/projector.py, MlpProjector,
    low_high_hybrid_split_mlp_gelu.
    """

    features: int
    depth: int = 2
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def num_tokens(self, grid: Grid) -> int:
        """As many as there are features of one encoder."""
        return grid[0] * grid[1]

    def token_grid(self, grid: Grid) -> Grid | None:
        """That of the features."""
        return grid

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> dict[str, Any]:
        """No field to solve; the budget must be the number of features."""
        if budget != grid[0] * grid[1]:
            raise refuse("hybrid_mlp", budget, grid, [grid[0] * grid[1]], "it keeps every feature")
        return {}

    @nn.compact
    def __call__(
        self, features: VisualFeatures | tuple[VisualFeatures, VisualFeatures], *, deterministic: bool
    ) -> VisualTokens:
        """Tokens of places where both encoders have a feature.

        Raises:
          InfeasibleGrid: the two encoders' features are not those of one grid.
        """
        del deterministic  # nothing is drawn
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if isinstance(features, tuple):
            high, low = features
            if (high.grid, high.block) != (low.grid, low.block):
                raise InfeasibleGrid(
                    f"hybrid_mlp: needs the two encoders' features on one grid, got {high.grid[0]}x{high.grid[1]} "
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

"""Honeybee's C-Abstractor: convolutions, adaptive average pooling to the token grid, convolutions, an MLP."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlm_jax import axes
from vlm_jax.connectors.pool import average_windows
from vlm_jax.connectors.solving import OutputGrid
from vlm_jax.layers.block import REMAT_POLICIES
from vlm_jax.layers.conv import Conv
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.mlp import Mlp
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.position_embedding import LearnedPositions2D
from vlm_jax.layers.scan import scan_layers
from vlm_jax.layers.squares import in_rows, masked
from vlm_jax.ranges import Depth, Size
from vlm_jax.types import Dtype, Fields, Grid, VisualFeatures, VisualTokens

_SQUEEZE_RATIO = 0.25
_NORM_EPSILON = 1e-5  # of timm's LayerNormAct2d; its LayerNorm2d has 1e-6


class CAbstractor(OutputGrid, nn.Module):
    """Learned positions, `depth` RegNet blocks, means of windows, `depth` RegNet blocks, linear, SiLU, linear.

    Masked features are treated as padding: zero for the convolutions, and excluded from means.

    Attributes:
      features: the decoder's width D.
      output_grid: rows and columns of the tokens, solved from the budget.
      table_grid: rows and columns of the position table: the feature grid that the budget was solved
        for; interpolated to other grids.
      depth: blocks before the pooling, and as many after it; 3 in the release.
      width: channels of the blocks; the features' width when None. 1024 in the release, as its features.
      mlp_depth: linear layers of the MLP.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Cha et al. 2024 (Honeybee), section 3.2 and figure 3; Honeybee, projectors.py, CAbstractor.
    """

    kind = "c_abstractor"

    features: Size
    output_grid: tuple[Size, Size]
    table_grid: tuple[Size, Size]
    depth: Depth
    width: Size | None = None
    mlp_depth: Depth = 2
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> Fields:
        """The output grid of that size nearest in aspect to `grid`, and a position table for `grid`."""
        return {**super().for_budget(budget, grid), "table_grid": grid}

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # no randomness
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        grid = in_rows(features, "c_abstractor").grid
        x = masked(features).astype(self.dtype)
        table = LearnedPositions2D(self.table_grid, x.shape[-1], self.param_dtype, name="positions")
        x = x + table(grid).astype(self.dtype)[None]
        mask = features.mask.reshape(-1, *grid)
        x = self._stage(x.reshape(*mask.shape, -1), mask, "before")
        x, mask = average_windows(x.reshape(*features.mask.shape, -1), features, self.output_grid, self.kind)
        x = self._stage(x, mask, "after")
        mlp = Mlp(self.features, "silu", out_dim=self.features, depth=self.mlp_depth, name="mlp", **settings)
        tokens = mlp(x.reshape(x.shape[0], -1, x.shape[-1]))
        # Through the blocks' global means every token depends on every unmasked feature.
        return VisualTokens(tokens, jnp.broadcast_to(features.mask.any(1, keepdims=True), tokens.shape[:2]))

    def _stage(
        self, x: Float[Array, "B rows cols E"], mask: Bool[Array, "B rows cols"], name: str
    ) -> Float[Array, "B rows cols D"]:
        """The blocks of one stage; the first is separate where it changes the width."""
        width = self.width or x.shape[-1]
        fields = {"width": width, "dtype": self.dtype, "param_dtype": self.param_dtype}
        depth = self.depth
        # The maps between the linear layers cost more to store than to recompute.
        block = nn.remat(RegNetBlock, policy=REMAT_POLICIES["dots"], prevent_cse=False)
        if depth and width != x.shape[-1]:
            x, _ = block(name=f"{name}_first", **fields)(x, mask)
            depth -= 1
        if depth:
            x, _ = scan_layers(block, depth, in_axes=nn.broadcast)(name=name, **fields)(x, mask)
        return x


class RegNetBlock(nn.Module):
    """RegNet-Y's bottleneck with depthwise convolution: silu(x + linear(gate * conv(linear(x)))), LayerNorm after each.

    Attributes:
      width: output channels; an input of another width is projected to it for the residual sum.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Radosavovic et al. 2020, figure 4 and section 5; timm, models/regnet.py, Bottleneck.
    """

    width: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B rows cols E"], mask: Bool[Array, "B rows cols"]
    ) -> tuple[Float[Array, "B rows cols D"], None]:
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name, y):
            return Norm("layer", _NORM_EPSILON, name=f"{name}_norm", **settings)(y)

        def pointwise(name, names, y):
            return norm(name, Dense(self.width, names, use_bias=False, name=name, **settings)(y))

        real = mask[..., None]
        y = jax.nn.silu(pointwise("expand", (axes.EMBED, axes.MLP), x))
        conv = Conv(self.width, 3, padding=1, depthwise=True, name="depthwise", **settings)
        y = jax.nn.silu(norm("depthwise", conv(jnp.where(real, y, 0))))
        total = jnp.where(real, y, 0).astype(jnp.float32).sum((1, 2))
        mean = (total / jnp.maximum(mask.sum((1, 2)), 1)[:, None]).astype(self.dtype)
        squeezed = max(1, round(x.shape[-1] * _SQUEEZE_RATIO))
        gate = Mlp(squeezed, "silu", out_dim=self.width, name="squeeze_excite", **settings)(mean)
        y = y * jax.nn.sigmoid(gate)[:, None, None]
        y = pointwise("project", (axes.MLP, axes.EMBED), y)
        if x.shape[-1] != self.width:
            x = pointwise("shortcut", (axes.CHANNELS_IN, axes.EMBED), x)
        return jax.nn.silu(x + y), None

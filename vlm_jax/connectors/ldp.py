"""MobileVLM's lightweight downsample projector: an MLP, then two depthwise convolution blocks."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlm_jax import axes
from vlm_jax.budget import refuse
from vlm_jax.layers.conv import Conv, reached
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.mlp import ACTIVATIONS, Mlp
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.squares import in_rows, masked
from vlm_jax.ranges import NonNegative, Side, Size
from vlm_jax.types import Dtype, Fields, Grid, VisualFeatures, VisualTokens

WINDOW = 3  # of the depthwise convolutions; a larger stride would skip features


def squeezed_dim(width: int) -> int:
    """A quarter of the width, rounded to a multiple of 8 that is not more than a tenth below it.

    Source: torchvision, models/_utils.py, _make_divisible.
    """
    rounded = max(8, (width // 4 + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * (width // 4) else rounded


class LDPBlock(nn.Module):
    """MobileNetV3's block without expansion: depthwise convolution, squeeze-and-excite, linear, each LayerNorm.

    Attributes:
      stride: stride of the convolution; with stride 1 the input is added to the output.
      norm_epsilon: epsilon of both LayerNorms.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Howard et al. 2019 (MobileNetV3), section 5; torchvision, InvertedResidual.
    """

    stride: int
    norm_epsilon: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B rows cols D"], mask: Bool[Array, "B rows cols"]
    ) -> tuple[Float[Array, "B r c D"], Bool[Array, "B r c"]]:
        """Runs the block on a map that is zero outside of `mask`, and returns such a map."""
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = {"kind": "layer", "epsilon": self.norm_epsilon, **settings}
        width = x.shape[-1]
        conv = Conv(width, WINDOW, self.stride, WINDOW // 2, depthwise=True, name="depthwise", **settings)
        y = ACTIVATIONS["hard_swish"](Norm(name="depthwise_norm", **norm)(conv(x)))
        mask = reached(mask, WINDOW, self.stride) if self.stride > 1 else mask
        y = jnp.where(mask[..., None], y, 0)
        real = jnp.maximum(mask.sum((1, 2)), 1)[:, None]
        mean = (y.astype(jnp.float32).sum((1, 2)) / real).astype(self.dtype)
        gate = Mlp(squeezed_dim(width), "relu", name="squeeze_excite", **settings)(mean)
        y = y * jax.nn.hard_sigmoid(gate)[:, None, None]
        y = Dense(width, (axes.MLP, axes.EMBED), use_bias=False, name="project", **settings)(y)
        y = Norm(name="project_norm", **norm)(y)
        y = x + y if self.stride == 1 else y
        return jnp.where(mask[..., None], y, 0), mask


class LDP(nn.Module):
    """linear, GELU, linear, then an `LDPBlock` of stride 1 and one of `stride`.

    Masked features are treated as padding: zero for the convolutions, and excluded from means.

    Attributes:
      features: the decoder's width D.
      stride: stride of the last convolution, solved from the budget; 2 in the release.
      norm_epsilon: epsilon of every LayerNorm.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Chu et al. 2023 (MobileVLM); MobileVLM, mobilevlm/model/vision_projector.py, LDPBlock.
    """

    features: Size
    stride: Side = 2
    norm_epsilon: NonNegative = 1e-5
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def num_tokens(self, grid: Grid) -> int:
        """Number of outputs of the last convolution."""
        return -(-grid[0] // self.stride) * -(-grid[1] // self.stride)

    def token_grid(self, grid: Grid) -> Grid | None:
        """Rows and columns of these outputs."""
        return -(-grid[0] // self.stride), -(-grid[1] // self.stride)

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> Fields:
        """The smallest stride that gives `budget` tokens."""
        for stride in range(1, WINDOW + 1):
            if cls(1, stride).num_tokens(grid) == budget:
                return {"stride": stride}
        feasible = [cls(1, stride).num_tokens(grid) for stride in range(1, WINDOW + 1)]
        raise refuse("ldp", budget, grid, feasible, f"its convolution of window {WINDOW} has strides of 1 to {WINDOW}")

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # no randomness
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        grid = in_rows(features, "ldp").grid
        x = Mlp(self.features, "gelu", out_dim=self.features, name="mlp", **settings)(masked(features))
        mask = features.mask.reshape(-1, *grid)
        x = jnp.where(mask[..., None], x.reshape(*mask.shape, -1), 0)
        for i, stride in enumerate((1, self.stride)):
            x, mask = LDPBlock(stride, self.norm_epsilon, name=f"block_{i}", **settings)(x, mask)
        x = x.reshape(x.shape[0], -1, self.features)
        # Through the global means every token depends on every unmasked feature.
        return VisualTokens(x, jnp.broadcast_to(features.mask.any(1, keepdims=True), x.shape[:2]))

"""MobileVLM V2's projector: an MLP, adaptive average pooling, a depthwise convolution as position encoding."""

import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.connectors.pool import average_windows
from vlm_jax.connectors.solving import OutputGrid
from vlm_jax.layers.conv import Conv, reached
from vlm_jax.layers.mlp import Mlp
from vlm_jax.layers.squares import masked
from vlm_jax.ranges import Size
from vlm_jax.types import Dtype, VisualFeatures, VisualTokens


class LDPv2(OutputGrid, nn.Module):
    """linear, GELU, linear; means of windows; x + convolution(x).

    Attributes:
      features: the decoder's width D.
      output_grid: rows and columns of the tokens, solved from the budget; (12, 12) in the release for any
        feature grid.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Chu et al. 2024 (MobileVLM V2); MobileVLM, mobilevlm/model/vision_projector.py,
    LDPNetV2Projector.
    """

    kind = "ldp_v2"

    features: Size
    output_grid: tuple[Size, Size]
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualTokens:
        del deterministic  # no randomness
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Mlp(self.features, "gelu", out_dim=self.features, name="mlp", **settings)(masked(features))
        x, mask = average_windows(x, features, self.output_grid, self.kind)
        conv = Conv(self.features, 3, padding=1, use_bias=True, depthwise=True, name="positions", **settings)
        x = x + conv(x)
        return VisualTokens(x.reshape(x.shape[0], -1, self.features), reached(mask, 3).reshape(x.shape[0], -1))

"""A 2D convolution with logical axes, channels last."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlm_jax import axes
from vlm_jax.layers.dense import KERNEL_INIT, named


class Conv(nn.Module):
    """A square window over rows and columns: [B, rows, cols, in] -> [B, new_rows, new_cols, features].

    Attributes:
      features: output channels.
      window: side of the window.
      stride: step of the window.
      padding: zeros on every side, as torch counts them, or `SAME` as TensorFlow pads (at a stride
        above 1 more behind than in front).
      use_bias: adds a bias.
      depthwise: every channel has a window of its own; features must be the input's channels.
      dtype: dtype of the product.
      param_dtype: dtype of the stored parameters.
    """

    features: int
    window: int
    stride: int = 1
    padding: int | Literal["SAME"] = 0
    use_bias: bool = False
    depthwise: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B rows cols d_in"]) -> Float[Array, "B new_rows new_cols d_out"]:
        groups = x.shape[-1] if self.depthwise else 1
        kernel = self.param(
            "kernel",
            named(KERNEL_INIT, axes.PATCH, axes.PATCH, axes.CHANNELS_IN, axes.EMBED),
            (self.window, self.window, x.shape[-1] // groups, self.features),
            self.param_dtype,
        )
        padding = "SAME" if self.padding == "SAME" else [(self.padding, self.padding)] * 2
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        if self.use_bias:
            bias = self.param("bias", named(nn.initializers.zeros, axes.EMBED), (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype)[None, None, None]
        return y


def reached(mask: Bool[Array, "B rows cols"], window: int, stride: int = 1) -> Bool[Array, "B new_rows new_cols"]:
    """Which places of a `Conv` with an odd window and zeros of half of it around read a place of `mask`."""
    margin = [(0, 0), *[(window // 2, window // 2)] * 2]
    steps = (1, stride, stride)
    return jax.lax.reduce_window(mask, False, jax.lax.bitwise_or, (1, window, window), steps, margin)

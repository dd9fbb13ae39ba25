"""A 2D convolution with logical axes, channels last."""

import functools
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlm_jax import axes
from vlm_jax.layers.dense import KERNEL_INIT, with_axes
from vlm_jax.types import Dtype

_STD_EPSILON = 1e-5


class Conv(nn.Module):
    """A square window over rows and columns: [B, rows, cols, in] -> [B, new_rows, new_cols, features].

    Attributes:
      features: output channels.
      window: side of the window.
      stride: step of the window.
      padding: zeros on every side, as in torch, or `SAME` as TensorFlow pads (at a stride
        above 1 more at the end than at the start).
      use_bias: adds a bias.
      standardised: the kernel is used with mean 0 and deviation 1 over its window and input channels.
      depthwise: every channel has its own kernel; features must equal the input's channels.
      dtype: dtype of the product.
      param_dtype: dtype of the stored parameters.

    Source: Qiao et al. 2019 for the standardised kernel; vision_transformer, models_resnet.py, for its epsilon.
    """

    features: int
    window: int
    stride: int = 1
    padding: int | Literal["SAME"] = 0
    use_bias: bool = False
    standardised: bool = False
    depthwise: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B rows cols d_in"]) -> Float[Array, "B new_rows new_cols d_out"]:
        groups = x.shape[-1] if self.depthwise else 1
        if self.depthwise and self.features != x.shape[-1]:
            raise ValueError(f"features: a depthwise convolution keeps the {x.shape[-1]} channels, got {self.features}")
        kernel = self.param(
            "kernel",
            with_axes(KERNEL_INIT, axes.PATCH, axes.PATCH, axes.CHANNELS_IN, axes.EMBED),
            (self.window, self.window, x.shape[-1] // groups, self.features),
            self.param_dtype,
        )
        if self.standardised:
            kernel = kernel.astype(jnp.float32)
            centred = kernel - kernel.mean((0, 1, 2), keepdims=True)
            kernel = centred / (jnp.sqrt(jnp.square(centred).mean((0, 1, 2), keepdims=True)) + _STD_EPSILON)
        x, kernel, steps = x.astype(self.dtype), kernel.astype(self.dtype), (self.stride, self.stride)
        margin = [(self.padding, self.padding)] * 2 if self.padding != "SAME" else "SAME"
        if self.depthwise:
            if isinstance(margin, str):
                margin = jax.lax.padtype_to_pads(x.shape[1:3], (self.window, self.window), steps, margin)
            # Without the barrier XLA recomputes the inputs of x for every position in the window.
            padded = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), *margin, (0, 0))))
            y = cast(jax.Array, _depthwise(padded, kernel[:, :, 0], self.stride))
        else:
            y = jax.lax.conv_general_dilated(x, kernel, steps, margin, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        if self.use_bias:
            bias = self.param("bias", with_axes(nn.initializers.zeros, axes.EMBED), (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype)[None, None, None]
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(
    x: Float[Array, "B rows cols D"], kernel: Float[Array, "window window2 D"], stride: int
) -> Float[Array, "B new_rows new_cols D"]:
    """A sum of shifted maps, each times one position of the kernel.

    XLA fuses it into one pass. Its own grouped convolution takes 40 times as long on a CPU, and far longer
    for gradients, and on an accelerator it does not use the matrix units either.
    """
    window = kernel.shape[0]
    rows, cols = ((size - window) // stride + 1 for size in x.shape[1:3])
    total = jnp.zeros((), jnp.float32)
    for i, j in np.ndindex(window, window):
        shifted = x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (cols - 1) * stride + 1 : stride]
        total = total + shifted.astype(jnp.float32) * kernel[i, j].astype(jnp.float32)[None, None, None]
    return total.astype(x.dtype)


def _depthwise_forward(x, kernel, stride):
    return _depthwise(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride, kept, cotangent):
    """Row by row for the kernel: separate sums per kernel position would each read both maps again."""
    x, kernel = kept
    window, (rows, cols) = kernel.shape[0], cotangent.shape[1:3]

    def add_row(total, row):
        above = jax.lax.dynamic_slice_in_dim(x, row * stride, window, axis=1).astype(jnp.float32)
        below = jax.lax.dynamic_index_in_dim(cotangent, row, axis=1).astype(jnp.float32)
        stop = (cols - 1) * stride + 1
        sums = [(above[:, :, j : j + stop : stride] * below).sum((0, 2)) for j in range(window)]
        return total + jnp.stack(sums, axis=1), None

    total, _ = jax.lax.scan(add_row, jnp.zeros(kernel.shape, jnp.float32), jnp.arange(rows))
    # For x: the flipped kernel over the cotangent, with zeros around it and in between.
    margin = [(window - 1, window - 1 + (size - window) % stride, stride - 1) for size in x.shape[1:3]]
    spread = jax.lax.pad(cotangent, jnp.zeros((), cotangent.dtype), [(0, 0, 0), *margin, (0, 0, 0)])
    return _depthwise(jax.lax.optimization_barrier(spread), kernel[::-1, ::-1], 1), total.astype(kernel.dtype)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def reached(mask: Bool[Array, "B rows cols"], window: int, stride: int = 1) -> Bool[Array, "B new_rows new_cols"]:
    """True where an output of a `Conv` (odd window, padding of half a window) reads a position that `mask` marks."""
    margin = [(0, 0), *[(window // 2, window // 2)] * 2]
    steps = (1, stride, stride)
    return jax.lax.reduce_window(mask, False, jax.lax.bitwise_or, (1, window, window), steps, margin)

"""Embedding of the non-overlapping patches of an image."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.dense import KERNEL_INIT, with_axes
from vlm_jax.types import Dtype


class PatchEmbed(nn.Module):
    """A convolution whose stride is its window: [B, h, w, c] -> [B, rows * cols, features].

    Pixels beyond the last whole patch are dropped, as a convolution without padding does.

    Attributes:
      patch_size: side of a patch in pixels.
      features: output width.
      use_bias: adds a bias.
      dtype: dtype of the product.
      param_dtype: dtype of the stored parameters.

    Source: Dosovitskiy et al. 2021, eq. 1.
    """

    patch_size: int
    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B height width channels"]) -> Float[Array, "B N D"]:
        side, channels = self.patch_size, images.shape[-1]
        kernel = self.param(
            "kernel",
            with_axes(KERNEL_INIT, axes.PATCH, axes.PATCH, axes.CHANNELS_IN, axes.EMBED),
            (side, side, channels, self.features),
            self.param_dtype,
        )
        # The windows do not overlap, so the convolution is one matrix product on the patches.
        batch, height, width, _ = images.shape
        rows, cols = height // side, width // side
        x = images[:, : rows * side, : cols * side].astype(self.dtype)
        x = x.reshape(batch, rows, side, cols, side, channels).transpose(0, 1, 3, 2, 4, 5)
        x = jax.lax.dot_general(
            x.reshape(batch, rows * cols, -1),
            kernel.astype(self.dtype).reshape(-1, self.features),
            (((2,), (0,)), ((), ())),
        )
        if self.use_bias:
            bias = self.param("bias", with_axes(nn.initializers.zeros, axes.EMBED), (self.features,), self.param_dtype)
            x = x + bias.astype(self.dtype)[None, None]
        return x

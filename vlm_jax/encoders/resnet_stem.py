"""The ResNet in front of a hybrid ViT: weight-standardised convolutions and GroupNorm."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.conv import Conv
from vlm_jax.layers.dense import named
from vlm_jax.types import Grid

_GROUPS = 32
_NORM_EPSILON = 1e-6
_STD_EPSILON = 1e-5


class StdConv(Conv):
    """A convolution whose kernel is standardised over its window and input channels, padded `SAME`.

    Source: Qiao et al. 2019 (Weight standardization); vision_transformer, models_resnet.py, StdConv.
    """

    def standardised(self, kernel: jax.Array) -> jax.Array:
        """The kernel less its mean, over (its standard deviation + 1e-5), in float32."""
        kernel = kernel.astype(jnp.float32)
        centred = kernel - kernel.mean((0, 1, 2), keepdims=True)
        return centred / (jnp.sqrt(jnp.square(centred).mean((0, 1, 2), keepdims=True)) + _STD_EPSILON)

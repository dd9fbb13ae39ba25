"""The ResNet in front of a hybrid ViT: weight-standardised convolutions and GroupNorm."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.conv import Conv
from vlm_jax.layers.dense import with_axes
from vlm_jax.types import Dtype, Grid

_GROUPS = 32
_NORM_EPSILON = 1e-6
_STANDARDISED = {"padding": "SAME", "standardised": True}


class GroupNorm(nn.Module):
    """Normalises 32 groups of channels over all rows and columns; statistics in float32.

    Source: Wu and He 2018, eq. 7.
    """

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B rows cols D"]) -> Float[Array, "B rows cols D"]:
        width = x.shape[-1]
        scale = self.param("scale", with_axes(nn.initializers.ones, axes.NORM), (width,), self.param_dtype)
        bias = self.param("bias", with_axes(nn.initializers.zeros, axes.NORM), (width,), self.param_dtype)
        groups = x.astype(jnp.float32).reshape(*x.shape[:3], _GROUPS, -1)
        centred = groups - groups.mean((1, 2, 4), keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean((1, 2, 4), keepdims=True) + _NORM_EPSILON)
        scale, bias = (p.astype(jnp.float32)[None, None, None] for p in (scale, bias))
        return (normed.reshape(x.shape) * scale + bias).astype(self.dtype)


class ResidualUnit(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a skip connection, which is projected where the shape changes."""

    features: int
    stride: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B rows cols d_in"]) -> Float[Array, "B new_rows new_cols d_out"]:
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = {**_STANDARDISED, **settings}
        width, skip = 4 * self.features, x
        if x.shape[-1] != width or self.stride != 1:
            skip = Conv(width, 1, self.stride, name="conv_skip", **conv)(x)
            skip = GroupNorm(name="norm_skip", **settings)(skip)
        y = Conv(self.features, 1, name="conv1", **conv)(x)
        y = jax.nn.relu(GroupNorm(name="norm1", **settings)(y))
        y = Conv(self.features, 3, self.stride, name="conv2", **conv)(y)
        y = jax.nn.relu(GroupNorm(name="norm2", **settings)(y))
        y = Conv(width, 1, name="conv3", **conv)(y)
        return jax.nn.relu(skip + GroupNorm(name="norm3", **settings)(y))


class ResNetStem(nn.Module):
    """A root that divides each side by 4, and stages, each of which halves it from the second stage on.

    Attributes:
      layers: residual units in every stage; none for the root alone.
      width: channels of the root, a multiple of 32, which are normalised in groups; stage i has 4 * width * 2**i.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Dosovitskiy et al. 2021, section 3.1 (hybrid); vision_transformer, models_resnet.py.
    """

    layers: tuple[int, ...]
    width: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @property
    def step(self) -> int:
        """Pixels of the image from one position of the map to the next."""
        return 4 * 2 ** max(len(self.layers) - 1, 0)

    def map_size(self, height: int, width: int) -> Grid:
        """Rows and columns of the map of an image of `height` x `width` pixels."""
        return -(-height // self.step), -(-width // self.step)

    @nn.compact
    def __call__(self, images: Float[Array, "B height width channels"]) -> Float[Array, "B rows cols D"]:
        if self.width % _GROUPS:
            raise ValueError(f"stem_width: expected a multiple of {_GROUPS}, its groups of channels, got {self.width}")
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Conv(self.width, 7, 2, name="conv_root", **_STANDARDISED, **settings)(images)
        x = jax.nn.relu(GroupNorm(name="norm_root", **settings)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, count in enumerate(self.layers, 1):
            for unit in range(1, count + 1):
                stride = 2 if stage > 1 and unit == 1 else 1
                features = self.width * 2 ** (stage - 1)
                x = ResidualUnit(features, stride, name=f"stage{stage}_unit{unit}", **settings)(x)
        return x

"""CLIP's ResNet: a stem of three convolutions, anti-aliased strides, attention pooling."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.attention import Context, MultiHeadAttention
from vlm_jax.layers.conv import Conv
from vlm_jax.layers.dense import with_axes
from vlm_jax.ranges import Natural, Side, Size
from vlm_jax.types import Dtype, Grid, VisualFeatures

_NORM_EPSILON = 1e-5


class FrozenBatchNorm(nn.Module):
    """Batch normalisation by the release's running statistics, which are never updated.

    They are parameters without a gradient, so that they are loaded, sharded and saved like other parameters.

    Source: Ioffe and Szegedy 2015, algorithm 2.
    """

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B rows cols D"]) -> Float[Array, "B rows cols D"]:
        ones, zeros = (with_axes(init, axes.NORM) for init in (nn.initializers.ones, nn.initializers.zeros))
        inits = {"scale": ones, "bias": zeros, "mean": zeros, "variance": ones}
        p = {
            name: self.param(name, init, (x.shape[-1],), self.param_dtype).astype(jnp.float32)[None, None, None]
            for name, init in inits.items()
        }
        mean, variance = jax.lax.stop_gradient((p["mean"], p["variance"]))
        y = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + _NORM_EPSILON) * p["scale"] + p["bias"]
        return y.astype(self.dtype)


def _average(x: jax.Array, window: int) -> jax.Array:
    return x if window == 1 else nn.avg_pool(x, (window, window), (window, window))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a skip connection; a stride is average pooling on both paths.

    Attributes:
      features: inner channels; the output has four times as many.
      stride: window of the average pooling.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: openai/CLIP, clip/model.py, Bottleneck.
    """

    features: int
    stride: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B rows cols d_in"]) -> Float[Array, "B new_rows new_cols d_out"]:
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width, skip = 4 * self.features, x
        if self.stride > 1 or x.shape[-1] != width:
            skip = Conv(width, 1, name="conv_skip", **settings)(_average(x, self.stride))
            skip = FrozenBatchNorm(name="norm_skip", **settings)(skip)
        y = Conv(self.features, 1, name="conv1", **settings)(x)
        y = jax.nn.relu(FrozenBatchNorm(name="norm1", **settings)(y))
        y = Conv(self.features, 3, padding=1, name="conv2", **settings)(y)
        y = _average(jax.nn.relu(FrozenBatchNorm(name="norm2", **settings)(y)), self.stride)
        y = Conv(width, 1, name="conv3", **settings)(y)
        return jax.nn.relu(skip + FrozenBatchNorm(name="norm3", **settings)(y))


class AttentionPool(nn.Module):
    """One attention layer whose query is the mean of all positions, and whose keys are the positions and their mean.

    Attributes:
      num_heads: attention heads.
      num_positions: rows of the position table, one per position of the map in training.
      out_dim: output width.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Radford et al. 2021 (CLIP), section 2.4; openai/CLIP, clip/model.py, AttentionPool2d.
    """

    num_heads: int
    num_positions: int
    out_dim: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B E"]:
        if x.shape[1] != self.num_positions:
            raise ValueError(
                f"expected a map of {self.num_positions} positions, as in training, got {x.shape[1]}; "
                "resize the images to image_size"
            )
        init = with_axes(nn.initializers.normal(x.shape[-1] ** -0.5), axes.POSITION, axes.EMBED)
        table = self.param("positions", init, (self.num_positions + 1, x.shape[-1]), self.param_dtype)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1) + table.astype(self.dtype)[None]
        attention = MultiHeadAttention(
            self.num_heads,
            out_dim=self.out_dim,
            name="attention",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        pooled, _ = attention(x[:, :1], Context("full"), inputs_k=x)
        return pooled[:, 0]


class ModifiedResNet(nn.Module):
    """CLIP's ResNet; its features are the positions of the last map, its pooled vector is the attention pool's output.

    Attributes:
      image_size: (height, width) in pixels of training.
      layers: bottlenecks in each of the four stages.
      base_width: channels of the stem; the output has 32 times as many.
      num_heads: heads of the attention pool.
      projection_dim: width of the pooled vector.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Radford et al. 2021 (CLIP), section 2.4; openai/CLIP, clip/model.py, ModifiedResNet.
    """

    image_size: tuple[Side, Side]
    layers: tuple[Natural, Natural, Natural, Natural]
    base_width: Size
    num_heads: Size
    projection_dim: Size
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @property
    def features(self) -> int:
        """Width D_v of the features."""
        return 32 * self.base_width

    @property
    def num_blocks(self) -> int:
        """None: stages of convolutions."""
        return 0

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of the last map; every halving rounds down except the first, which rounds up.

        Raises:
          ValueError: the last map is empty.
        """
        grid = (-(-height // 2) // 16, -(-width // 2) // 16)
        if min(grid) < 1:
            raise ValueError(f"an image of {height}x{width} pixels is smaller than one feature of 32")
        return grid

    @nn.compact
    def __call__(self, images: Float[Array, "B height width channels"]) -> VisualFeatures:
        """Encodes normalised pixels."""
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x, half = images, self.base_width // 2
        for i, (features, stride) in enumerate(((half, 2), (half, 1), (self.base_width, 1)), 1):
            x = Conv(features, 3, stride, padding=1, name=f"stem_conv{i}", **settings)(x)
            x = jax.nn.relu(FrozenBatchNorm(name=f"stem_norm{i}", **settings)(x))
        x = _average(x, 2)
        for stage, count in enumerate(self.layers):
            for block in range(count):
                stride = 2 if stage and not block else 1
                name = f"stage{stage + 1}_block{block}"
                x = Bottleneck(self.base_width * 2**stage, stride, name=name, **settings)(x)
        grid = (x.shape[1], x.shape[2])
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        rows, cols = self.grid(*self.image_size)
        pool = AttentionPool(self.num_heads, rows * cols, self.projection_dim, name="head", **settings)
        return VisualFeatures(x, jnp.ones(x.shape[:2], bool), grid, pooled=pool(x))

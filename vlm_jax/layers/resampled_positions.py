"""A learned position table read at the positions of packed patches, whose images differ in size."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.layers.dense import with_axes
from vlm_jax.types import Dtype

Interpolation = Literal["bicubic", "bilinear_corners"]
_A = -0.75  # torch's bicubic; Pillow and jax.image.resize have -0.5


def cubic_weights(positions: Int[Array, "B N"], sizes: Int[Array, "B N"], side: int) -> Float[Array, "B N {side}"]:
    """Weights of a row of `side` samples for position `positions` of `sizes`: four taps, clamped to the row.

    The result is row `positions` of `interpolation.interpolation_weights(side, sizes, "bicubic")`, for traced
    sizes: torch's `interpolate(mode="bicubic", align_corners=False)` without antialiasing.

    Args:
      positions: index of a sample after resizing.
      sizes: number of samples after resizing, at least 1.
      side: number of samples before.

    Source: Keys 1981, eq. 4.
    """
    centres = (positions.astype(jnp.float32) + 0.5) * (side / sizes.astype(jnp.float32)) - 0.5
    first = jnp.floor(centres)
    t = centres - first

    def near(d):
        return ((_A + 2) * d - (_A + 3)) * d * d + 1

    def far(d):
        return ((_A * d - 5 * _A) * d + 8 * _A) * d - 4 * _A

    weights = jnp.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], axis=-1)
    taps = first.astype(jnp.int32)[..., None] + jnp.arange(-1, 3)[None, None]
    onto = jax.nn.one_hot(jnp.clip(taps, 0, side - 1), side, dtype=jnp.float32)
    return jnp.sum(weights[..., None] * onto, axis=-2)


def linear_weights(positions: Int[Array, "B N"], sizes: Int[Array, "B N"], side: int) -> Float[Array, "B N {side}"]:
    """Weights of a row of `side` samples for position `positions` of `sizes`: two taps, ends on ends.

    torch's `interpolate(mode="bilinear", align_corners=True)` for traced sizes; arguments as in `cubic_weights`.
    """
    # Multiplied before the division, as in the reference: a rounded step would move samples of large tables.
    places = positions.astype(jnp.float32) * (side - 1) / jnp.maximum(sizes - 1, 1).astype(jnp.float32)
    samples = jnp.arange(side, dtype=jnp.float32)[None, None]
    return jnp.maximum(1 - jnp.abs(places[..., None] - samples), 0)


WEIGHTS = {"bicubic": cubic_weights, "bilinear_corners": linear_weights}


class ResampledPositions(nn.Module):
    """A learned square table of `side` x `side` rows, resized to every image's grid.

    The two axes' weights make one matrix [N, side * side], so reading the table and its gradient are
    one matrix product each, whatever images are packed together.

    Attributes:
      side: rows and columns of the table.
      features: width.
      param_dtype: dtype of the stored table.
      interpolation: `bicubic`, or `bilinear_corners`, where the table's corners are those of the image.
    """

    side: int
    features: int
    param_dtype: Dtype = jnp.float32
    interpolation: Interpolation = "bicubic"

    @nn.compact
    def __call__(self, positions: Int[Array, "B N 2"], sizes: Int[Array, "B N 2"]) -> Float[Array, "B N D"]:
        """The float32 embeddings of (row, column) `positions` in images of `sizes` patches."""
        init = with_axes(nn.initializers.normal(1 / np.sqrt(self.features)), axes.POSITION, axes.EMBED)
        table = self.param("table", init, (self.side**2, self.features), self.param_dtype)
        weigh = WEIGHTS[self.interpolation]
        rows, cols = (weigh(positions[..., i], sizes[..., i], self.side) for i in (0, 1))
        weights = rows[..., :, None] * cols[..., None, :]
        flat = weights.reshape(*positions.shape[:2], self.side**2)
        # A default-precision product of a TPU would round weights and table to bfloat16.
        return jnp.dot(flat, table.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)

"""Resizes images and feature maps with the matrices of `vlm_jax.interpolation`.

`jax.image.resize` has no `bicubic`, `area` and `corner_linear` of these.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from vlm_jax.interpolation import ResizeKind, interpolation_weights
from vlm_jax.types import Array, Grid


def resize(
    x: Float[Array, "*batch rows cols D"], grid: Grid, kind: ResizeKind
) -> Float[Array, "*batch new_rows new_cols D"]:
    """Interpolates rows and columns, in float32, and returns x's dtype.

    Args:
      x: images or feature maps, channels last.
      grid: rows and columns of the result.
      kind: as in the table of `vlm_jax.interpolation`.

    Raises:
      ValueError: unknown kind, or a size below 1.
    """
    return resize_axis(resize_axis(x, -3, grid[0], kind), -2, grid[1], kind)


def resize_axis(x: Float[Array, "*shape"], axis: int, size: int, kind: ResizeKind) -> Float[Array, "*new_shape"]:
    """Interpolates one axis to `size` samples; as `resize`."""
    weights = interpolation_weights(x.shape[axis], size, kind)
    if size == x.shape[axis]:
        return x
    moved = jnp.moveaxis(jnp.asarray(x, jnp.float32), axis, -1)
    # A default-precision product of a TPU would round the pixels to bfloat16.
    out = jnp.einsum("...i,oi->...o", moved, jnp.asarray(weights), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(out, -1, axis).astype(x.dtype)

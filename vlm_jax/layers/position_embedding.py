"""2D position embeddings, sin-cos and learned, at the training grid or interpolated to another."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.interpolation import ResizeKind
from vlm_jax.layers.dense import with_axes
from vlm_jax.layers.resize import resize
from vlm_jax.types import Dtype, Grid


def sincos_2d(
    grid: Grid, dim: int, *, table_grid: Grid | None = None, temperature: float = 10_000.0, last: bool = True
) -> np.ndarray:
    """[rows * cols, dim] float32 of sin and cos of the column, then of the row.

    Args:
      grid: rows and columns of the result.
      dim: width, a multiple of 4.
      table_grid: rows and columns of training; coordinates of `grid` are stretched over it, so
        that the same point of the image gets the same embedding. None leaves them unstretched.
      temperature: longest wavelength over 2 pi, in patches.
      last: whether the longest wavelength is used (MoCo v3, big_vision) or would be the
        next one (MAE, Qwen-VL).

    Raises:
      ValueError: dim is not a multiple of 4.

    Source: big_vision, models/vit.py, posemb_sincos_2d (order sin x, cos x, sin y, cos y).
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, got {dim}")
    quarter = dim // 4
    omega = 1.0 / temperature ** (np.arange(quarter) / max(quarter - last, 1))
    reference = table_grid or grid
    y, x = ((np.arange(size) + 0.5) * (full / size) - 0.5 for size, full in zip(grid, reference, strict=True))
    y, x = np.meshgrid(y, x, indexing="ij")
    angle_y, angle_x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    table = np.concatenate([np.sin(angle_x), np.cos(angle_x), np.sin(angle_y), np.cos(angle_y)], axis=1)
    return table.astype(np.float32)


class LearnedPositions2D(nn.Module):
    """A learned table over `table_grid`, interpolated to any other grid.

    Attributes:
      table_grid: rows and columns of the table as trained.
      features: width.
      param_dtype: dtype of the stored table.
      interpolation: a kind of `vlm_jax.interpolation`.
    """

    table_grid: Grid
    features: int
    param_dtype: Dtype = jnp.float32
    interpolation: ResizeKind = "bicubic_antialias"

    @nn.compact
    def __call__(self, grid: Grid) -> Float[Array, "N D"]:
        rows, cols = self.table_grid
        init = with_axes(nn.initializers.normal(1 / np.sqrt(self.features)), axes.POSITION, axes.EMBED)
        table = self.param("table", init, (rows * cols, self.features), self.param_dtype)
        if grid == self.table_grid:
            return table
        square = table.astype(jnp.float32).reshape(rows, cols, self.features)
        return resize(square, grid, self.interpolation).reshape(-1, self.features)

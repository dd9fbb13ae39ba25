"""2D rotary positions: one half of a head's angles depends on the row, the other on the column."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlm_jax.layers.rope import frequencies, rope_angles
from vlm_jax.types import Grid


def rope_2d_angles(positions: Int[Array, "B N 2"], head_dim: int, theta: float) -> Float[Array, "B N half"]:
    """Angles in radians, float32, for `rope.rotate`: head_dim / 4 for the row, then as many for the column.

    Args:
      positions: (row, column) of every patch in its own image.
      head_dim: H, a multiple of 4.
      theta: base of the wavelengths; coordinate i of a half is rotated by position * theta ** (-4 i / H).

    Raises:
      ValueError: head_dim is not a multiple of 4.

    Source: Wang et al. 2024 (Qwen2-VL), section 2.1; transformers, Qwen2VLVisionRotaryEmbedding.
    """
    _check(head_dim)
    axes = (rope_angles(positions[..., axis], head_dim // 2, theta) for axis in (0, 1))
    return jnp.concatenate(list(axes), axis=-1)


def centre_angles(grid: Grid, head_dim: int, theta: float) -> Float[np.ndarray, "N half"]:
    """Angles in radians, float32, for `rope.rotate`, of the patches of an image at any resolution.

    The same as `rope_2d_angles` of the centres of the patches, whose coordinates are 2 pi times -1 at the upper or left
    edge of the image, and 2 pi at the other.

    Args:
      grid: rows and columns of patches, which are returned row by row.
      head_dim: H, a multiple of 4.
      theta: base of the wavelengths.

    Raises:
      ValueError: head_dim is not a multiple of 4.

    Source: Siméoni et al. 2025 (DINOv3), section 3.2; transformers, DINOv3ViTRopePositionEmbedding.
    """
    _check(head_dim)
    waves = frequencies(head_dim // 2, theta)
    rows, cols = ((2 * (np.arange(0.5, count, dtype=np.float32) / count) - 1) for count in grid)
    centres = np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1).reshape(-1, 2)
    angles = np.float32(2 * math.pi) * centres[:, :, None] * waves[None, None]
    return angles.reshape(len(centres), -1).astype(np.float32)


def _check(head_dim: int) -> None:
    if head_dim % 4:
        raise ValueError(f"2D rotary positions need a head_dim that is a multiple of 4, got {head_dim}")

"""2D rotary positions: one half of a head's angles depends on the row, the other on the column."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.layers.rope import rope_angles


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
    if head_dim % 4:
        raise ValueError(f"2D rotary positions need a head_dim that is a multiple of 4, got {head_dim}")
    axes = (rope_angles(positions[..., axis], head_dim // 2, theta) for axis in (0, 1))
    return jnp.concatenate(list(axes), axis=-1)

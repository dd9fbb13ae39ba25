"""Rotary position embeddings, half-split as in Llama: coordinate i turns with coordinate i + H/2."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_angles(positions: Int[Array, "B T"], head_dim: int, theta: float) -> Float[Array, "B T half"]:
    """Angles in radians, float32: position times theta ** (-2 i / head_dim), i < head_dim / 2.

    Source: Su et al. 2021 (RoFormer), eq. 15; the half-split order of Hugging Face's Llama.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return positions[..., None].astype(jnp.float32) * (1.0 / theta**exponents)[None, None, :]


def rotate(x: Float[Array, "B T N H"], angles: Float[Array, "B T half"]) -> Float[Array, "B T N H"]:
    """Turns every pair (x[i], x[i + H/2]) by its angle; computed in float32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)

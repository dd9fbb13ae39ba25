"""Rotary angles of a decoder's positions, by the length of their sequence where the scaling wants it."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.decoders.cache import Cache
from vlm_jax.layers.rope import Rope, sequence_lengths
from vlm_jax.types import PADDING_SEGMENT, Positions


def no_prompt(rope: Rope, batch_size: int) -> Int[Array, "B"] | None:
    """`Cache.prompt_length` of an empty cache."""
    return jnp.zeros(batch_size, jnp.int32) if rope.by_prompt else None


def rotary_angles(
    rope: Rope, positions: Positions, segment_ids: Int[Array, "B T"], head_dim: int, cache: Cache | None
) -> tuple[Float[Array, "B T half"], Cache | None]:
    """Angles of T positions, after those in the cache when there is one.

    Args:
      rope: the settings.
      positions: of each place, on one axis or three.
      segment_ids: as in `Batch`.
      head_dim: coordinates of a head that turn.
      cache: what comes before, or None.

    Returns:
      Angles in radians, and the cache, which from its first call on knows the length of the prompt.
    """
    lengths = None
    if rope.by_length:
        lengths = sequence_lengths(positions, segment_ids)
        if cache is not None and cache.prompt_length is not None:
            longest = jnp.max(jnp.where(segment_ids == PADDING_SEGMENT, 0, lengths), axis=1)
            longest = jnp.where(cache.prompt_length == 0, longest, cache.prompt_length)
            cache = dataclasses.replace(cache, prompt_length=longest)
            lengths = jnp.broadcast_to(longest[:, None], lengths.shape)
    return rope.angles(positions, head_dim, lengths), cache

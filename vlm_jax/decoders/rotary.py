"""Lengths of a decoder's sequences, for rotary scalings that depend on them."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int

from vlm_jax.decoders.cache import Cache
from vlm_jax.layers.rope import Rope, sequence_lengths
from vlm_jax.types import PADDING_SEGMENT, Positions


def no_prompt(ropes: Sequence[Rope], batch_size: int) -> Int[Array, "B"] | None:
    """`Cache.prompt_length` of an empty cache."""
    return jnp.zeros(batch_size, jnp.int32) if any(rope.by_prompt for rope in ropes) else None


def rotary_lengths(
    ropes: Sequence[Rope], positions: Positions, segment_ids: Int[Array, "B T"], cache: Cache | None
) -> tuple[Int[Array, "B T"] | None, Cache | None]:
    """Lengths of the sequences of T positions, which follow those in the cache if there is one.

    Args:
      ropes: the rotary settings of the decoder.
      positions: of each token, on one axis or three.
      segment_ids: as in `Batch`.
      cache: the previous positions, or None.

    Returns:
      The lengths where a scaling needs them, else None; and the cache, which stores the prompt length
      from the first call on.
    """
    lengths = None
    if any(rope.by_length for rope in ropes):
        lengths = sequence_lengths(positions, segment_ids)
        if cache is not None and cache.prompt_length is not None:
            longest = jnp.max(jnp.where(segment_ids == PADDING_SEGMENT, 0, lengths), axis=1)
            longest = jnp.where(cache.prompt_length == 0, longest, cache.prompt_length)
            cache = dataclasses.replace(cache, prompt_length=longest)
            lengths = jnp.broadcast_to(longest[:, None], lengths.shape)
    return lengths, cache

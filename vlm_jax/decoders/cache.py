"""The key-value cache: a pytree of fixed size, written in place of its empty slots."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vlm_jax.layers.attention import KeyValue
from vlm_jax.types import struct


@struct
class Cache:
    """Keys and values of every layer for `S` slots of each row.

    Every row writes at the same slot, so padding inside a row leaves slots whose segment is 0;
    positions come with the tokens, and rows of different lengths need nothing else.

    Attributes:
      layers: keys and values, [L, B, S, K, H]; or another tree of what a decoder's layers keep, whose leaves
        start with [L, B, S].
      segment_ids: segment of each slot; 0 where a slot is empty or padding.
      length: slots written so far.
      rest: that of the layers behind a drop of visual tokens, which has fewer slots; None where these are all.
      prompt_length: positions of every row's prompt, 0 before there is one; None where nothing depends on it.
    """

    layers: Any
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]
    rest: "Cache | None" = None
    prompt_length: Int[Array, "B"] | None = None

    @classmethod
    def empty(cls, depth: int, batch_size: int, length: int, num_kv_heads: int, head_dim: int, dtype: Any) -> "Cache":
        """An empty cache of `length` slots a row."""
        shape = (depth, batch_size, length, num_kv_heads, head_dim)
        return cls(
            KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)),
            jnp.zeros((batch_size, length), jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    @property
    def parts(self) -> "list[Cache]":
        """This, and those behind each drop."""
        return [self, *([] if self.rest is None else self.rest.parts)]

    @classmethod
    def chained(cls, parts: "Sequence[Cache]") -> "Cache":
        """One cache of `parts`."""
        return dataclasses.replace(parts[0], rest=cls.chained(parts[1:]) if len(parts) > 1 else None)

    def with_segments(self, segment_ids: Int[Array, "B T"]) -> "Cache":
        """The cache with the next T slots given to `segment_ids`; keys and values follow."""
        written = jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, (0, self.length))
        return dataclasses.replace(self, segment_ids=written, length=self.length + segment_ids.shape[1])

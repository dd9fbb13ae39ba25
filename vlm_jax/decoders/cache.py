"""The key-value cache: a pytree of fixed size, written in place of its empty slots."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vlm_jax.layers.per_layer import PerLayer, written
from vlm_jax.types import static_field, struct


@struct
class Cache:
    """Keys and values of every layer for `S` slots of each row.

    Every row writes at the same slot, so padding inside a row leaves slots whose segment is 0;
    positions come with the tokens, and rows of different lengths need nothing else.

    Attributes:
      layers: a `KeyValue`, or another such tuple of stacks with a leading layer axis, or a tuple of those.
      segment_ids: segment of each slot; 0 where a slot is empty or padding.
      length: slots written so far.
      rest: that of the layers behind a drop of visual tokens, which has fewer slots; None where these are all.
      position_shift: of layers behind a drop that numbers positions anew, by how much positions of what follows are
        smaller there; else None.
      prompt_length: positions of every row's prompt, 0 before there is one; None where nothing depends on it.
      is_empty: nothing is written yet, which a program is compiled for: a prompt then attends to itself alone.
    """

    layers: Any
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]
    rest: "Cache | None" = None
    position_shift: Int[Array, "B"] | None = None
    prompt_length: Int[Array, "B"] | None = None
    is_empty: bool = static_field(default=False)

    @classmethod
    def empty(cls, layers: Any, batch_size: int, length: int) -> "Cache":
        """An empty cache of `length` slots a row, which are held in `layers`."""
        segment_ids = jnp.zeros((batch_size, length), jnp.int32)
        return cls(layers, segment_ids, jnp.zeros((), jnp.int32), is_empty=True)

    @property
    def parts(self) -> "list[Cache]":
        """This, and those behind each drop."""
        return [self, *([] if self.rest is None else self.rest.parts)]

    @classmethod
    def chained(cls, parts: "Sequence[Cache]") -> "Cache":
        """One cache of `parts`."""
        return dataclasses.replace(parts[0], rest=cls.chained(parts[1:]) if len(parts) > 1 else None)

    @property
    def readable(self) -> Any:
        """The layers as a call reads them: without slots while nothing is written."""
        if not self.is_empty:
            return self.layers
        return over_layers(lambda leaf, axis: jax.lax.slice_in_dim(leaf, 0, 0, axis=axis % leaf.ndim), self.layers)

    def key_segments(self, segment_ids: Int[Array, "B T"]) -> Int[Array, "B S"]:
        """Segments of what a call reads: of the cache as it is, then its own."""
        return segment_ids if self.is_empty else jnp.concatenate([self.segment_ids, segment_ids], axis=1)

    def with_segments(self, segment_ids: Int[Array, "B T"]) -> "Cache":
        """The cache with the next T slots given to `segment_ids`."""
        held = jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, (0, self.length))
        return dataclasses.replace(self, segment_ids=held, length=self.length + segment_ids.shape[1], is_empty=False)

    def with_written(self, fresh: Any, segment_ids: Int[Array, "B T"]) -> "Cache":
        """The cache with what T positions gave, stacks in the form of `layers`, in its next slots."""
        layers = over_layers(lambda old, new, axis: written(old, new, self.length, axis), self.layers, fresh)
        return dataclasses.replace(self.with_segments(segment_ids), layers=layers)

    def per_layer(self) -> "Cache":
        """The cache with an array a layer, for platforms that want it; not for use inside a program."""
        layers = over_layers(lambda leaf, _: PerLayer.of(leaf, writable=True), self.layers)
        return dataclasses.replace(self, layers=layers, rest=None if self.rest is None else self.rest.per_layer())


def over_layers(function: Callable[..., Any], layers: Any, *others: Any) -> Any:
    """`function(*leaves, axis of the slots)` over the stacks of `layers`."""
    if not hasattr(layers, "SLOTS"):
        return tuple(over_layers(function, *parts) for parts in zip(layers, *others, strict=True))
    return type(layers)(*(function(*leaves) for leaves in zip(layers, *others, layers.SLOTS, strict=True)))

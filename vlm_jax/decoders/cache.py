"""The cache of earlier tokens: a pytree of fixed size, with slots that are written in order, or states of layers."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vlm_jax.layers.attention import KeyValue
from vlm_jax.layers.gated_delta import DeltaState
from vlm_jax.layers.latent_attention import LatentKeyValue
from vlm_jax.layers.per_layer import written
from vlm_jax.types import Tree, static_field, struct

KINDS = (KeyValue, LatentKeyValue, DeltaState)  # what the layers of a stack keep


@struct
class Cache:
    """What every layer keeps of earlier tokens: keys and values in `S` slots of each row, or a state of fixed size.

    Every row writes at the same slot, so padding inside a row leaves slots with segment 0;
    positions are passed with the tokens, so rows of different lengths need nothing else.

    Attributes:
      layers: what each stack of the decoder's layers keeps, with a leading layer axis: a `KeyValue` or another kind.
      segment_ids: segment of each slot; 0 where a slot is empty or padding.
      length: slots written so far.
      rest: cache of the layers after a drop of visual tokens, with fewer slots; None if there are none.
      position_shift: in layers after a drop that renumbers positions, the amount to subtract from later
        positions; else None.
      prompt_length: number of positions of every row's prompt, 0 before it is written; None if unused.
      is_empty: whether nothing is written yet (static): a prompt then attends only to itself.
    """

    layers: tuple[Tree, ...]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]
    rest: "Cache | None" = None
    position_shift: Int[Array, "B"] | None = None
    prompt_length: Int[Array, "B"] | None = None
    is_empty: bool = static_field(default=False)

    @classmethod
    def empty(cls, layers: tuple[Tree, ...], batch_size: int, length: int) -> "Cache":
        """An empty cache of `length` slots per row, stored in `layers`."""
        segment_ids = jnp.zeros((batch_size, length), jnp.int32)
        return cls(layers, segment_ids, jnp.zeros((), jnp.int32), is_empty=True)

    @property
    def parts(self) -> "list[Cache]":
        """This cache and those after each drop."""
        return [self, *([] if self.rest is None else self.rest.parts)]

    @classmethod
    def chained(cls, parts: "Sequence[Cache]") -> "Cache":
        """Chains `parts` into one cache."""
        return dataclasses.replace(parts[0], rest=cls.chained(parts[1:]) if len(parts) > 1 else None)

    @property
    def readable(self) -> tuple[Tree, ...]:
        """The layers to read: without slots while nothing is written."""
        if not self.is_empty:
            return self.layers
        return over_layers(_without_slots, self.layers)

    def key_segments(self, segment_ids: Int[Array, "B T"]) -> Int[Array, "B S"]:
        """Segments of the keys: of the cache, then of the new positions."""
        return segment_ids if self.is_empty else jnp.concatenate([self.segment_ids, segment_ids], axis=1)

    def with_segments(self, segment_ids: Int[Array, "B T"]) -> "Cache":
        """The cache with `segment_ids` in the next T slots."""
        held = jax.lax.dynamic_update_slice(self.segment_ids, segment_ids, (0, self.length))
        return dataclasses.replace(self, segment_ids=held, length=self.length + segment_ids.shape[1], is_empty=False)

    def with_written(self, fresh: tuple[Tree, ...], segment_ids: Int[Array, "B T"]) -> "Cache":
        """The cache with `fresh`, the values of T positions in the form of `layers`, written to the next slots."""
        layers = over_layers(lambda old, new, axis: written(old, new, self.length, axis), self.layers, fresh)
        return dataclasses.replace(self.with_segments(segment_ids), layers=layers)


def over_layers(function: Callable[..., Tree], layers: tuple[Tree, ...], *others: tuple[Tree, ...]) -> tuple[Tree, ...]:
    """`function(*leaves, axis of the slots)` over the stacks of `layers`; the axis of what has no slots is None."""

    def over_stack(stack: Tree, *others: Tree) -> Tree:
        return type(stack)(*(function(*leaves) for leaves in zip(stack, *others, stack.SLOTS, strict=True)))

    return tuple(over_stack(*stacks) for stacks in zip(layers, *others, strict=True))


def _without_slots(leaf: jax.Array, axis: int | None) -> jax.Array:
    return leaf if axis is None else jax.lax.slice_in_dim(leaf, 0, 0, axis=axis % leaf.ndim)

"""What attention attends to: the mask of a sequence as data, and cached keys and values."""

import dataclasses
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax import axes
from vlm_jax.layers.per_layer import joined
from vlm_jax.types import PADDING_SEGMENT, Dtype, static_field, struct

MaskKind = Literal["full", "causal"]


class KeyValue(NamedTuple):
    """Cached keys and values of one layer, or of all with a leading layer axis, in the layout of the products."""

    key: Float[Array, "*L B K H S"]
    value: Float[Array, "*L B K S H"]

    AXES = ((axes.LAYERS, axes.BATCH, axes.KV_HEADS, None, None),) * 2  # of all layers
    SLOTS = (-1, -2)  # the axis of positions in each

    @classmethod
    def empty(cls, depth: int, batch_size: int, length: int, num_heads: int, head_dim: int, dtype: Dtype) -> "KeyValue":
        """`length` slots for every row of all layers."""
        shape = (depth, batch_size, num_heads)
        return cls(jnp.zeros((*shape, head_dim, length), dtype), jnp.zeros((*shape, length, head_dim), dtype))

    def part(self, start: int, stop: int | None) -> "KeyValue":
        """The keys and values of layers `start` to `stop` - 1."""
        return KeyValue(*(leaf[start:stop] for leaf in self))

    def joined(self, other: "KeyValue") -> "KeyValue":
        """These layers followed by those of `other`."""
        return KeyValue(*map(joined, self, other))


class SharedKeyValue(NamedTuple):
    """Keys and values that a layer reads of an earlier one, which computed and cached them.

    Attributes:
      key, value: of the new positions, as attention takes them.
      past: those in the cache before them, of that layer; None for none.
    """

    key: Float[Array, "B T K H"]
    value: Float[Array, "B T K H"]
    past: KeyValue | None = None

    @classmethod
    def of(cls, fresh: KeyValue, past: KeyValue | None, dtype: Dtype) -> "SharedKeyValue":
        """From what one layer writes to its cache, and what it reads there; without slots in it, nothing is past."""
        key, value = fresh.key.transpose(0, 3, 1, 2), fresh.value.transpose(0, 2, 1, 3)
        held = past if past is not None and past.key.shape[-1] else None
        return cls(key.astype(dtype), value.astype(dtype), held)


@struct
class Context:
    """Inputs of attention other than the activations, shared by all layers of a stack.

    Attributes:
      mask_kind: `full` (each position attends to its segment) or `causal` (and to no later position).
      query_segments: segment ids of the queries; None where there is one segment.
      key_segments: segment ids of the keys, cached ones included.
      branches: branch ids of both queries and keys (without a cache); a position attends to
        branch 0 and its own branch. None where there is one branch.
      groups: group ids of both queries and keys (without a cache); in causal attention, consecutive positions of one
        id other than 0 also attend to each other, as those of an image prefix. None where there are no groups.
      groups_exceed_window: whether they do so whatever the window, as in PaliGemma 2; else the window bounds earlier
        positions of a group too, as in Gemma 3.
      angles: RoPE angles of the queries' positions, or None; of several ropes those of each, concatenated, of which a
        stack of blocks takes each block's own (`TransformerStack.ropes`).
      magnitude: factor of rotated queries and keys.
      query_scale: factor of every query, or None.
      window: keys that a query of causal attention attends to at most, its own included; None for all.
      key_bias: added to the scaled logits of every key, or None.
      block: positions of the consecutive blocks inside which full attention without a cache stays; None for no blocks.
      softcap: bounds the scaled logits before a bias and masks, as in Gemma 2, see `softcap.capped`; None for no bound.
    """

    mask_kind: MaskKind = static_field()
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    branches: Int[Array, "B T"] | None = None
    angles: Float[Array, "B T half"] | None = None
    key_bias: Float[Array, "B S"] | None = None
    magnitude: float = static_field(default=1.0)
    query_scale: Float[Array, "B T"] | None = None
    window: Int[Array, ""] | None = None
    block: int | None = static_field(default=None)
    groups: Int[Array, "B T"] | None = None
    groups_exceed_window: bool = static_field(default=False)
    softcap: float | None = static_field(default=None)

    def of_blocks(self) -> "Context":
        """The context of a batch that has every block of a sequence as a row."""
        queries, keys = (
            x if x is None else x.reshape(-1, self.block) for x in (self.query_segments, self.key_segments)
        )
        return Context("full", query_segments=queries, key_segments=keys, softcap=self.softcap)


def allowed(context: Context, num_queries: int, num_keys: int) -> Bool[Array, "B T S"] | Bool[Array, "1 T S"] | None:
    """The attention mask, True where a query may attend to a key; None where every query may attend to every key."""
    mask = None
    if context.mask_kind == "causal":
        mask = last_index(context, num_queries, num_keys)[:, :, None] >= jnp.arange(num_keys)[None, None]
    if context.block is not None:
        places = jnp.arange(num_keys) // context.block
        mask = (places[:, None] == places[None, :])[None]
    if context.query_segments is not None and context.key_segments is not None:
        same = context.query_segments[:, :, None] == context.key_segments[:, None, :]
        mask = same if mask is None else mask & same
    if context.branches is not None:
        keys = context.branches[:, None, :]
        readable = (keys == 0) | (keys == context.branches[:, :, None])
        mask = readable if mask is None else mask & readable
    if context.window is not None:
        if context.mask_kind != "causal" or mask is None:
            raise ValueError(f"an attention window is for causal attention, not {context.mask_kind}")
        order = key_order(context, num_keys)
        mask &= order[:, None, :] >= first_order(context, order, num_queries)[:, :, None]
    return mask


def last_index(context: Context, num_queries: int, num_keys: int) -> Int[Array, "B T"] | Int[Array, "1 T"]:
    """The index of the last key that a causal query attends to: its own, or that of the last position of its group."""
    own = jnp.arange(num_keys - num_queries, num_keys)[None]
    if context.groups is None:
        return own
    ends = jnp.where(jnp.pad(_goes_on(context.groups), ((0, 0), (0, 1))), num_keys, own)
    return jax.lax.cummin(ends, axis=1, reverse=True)


def first_order(context: Context, order: Int[Array, "_ S"], num_queries: int) -> Int[Array, "_ T"]:
    """The order of the first key in the window of a query; with `groups_exceed_window` of its group, if that is lower.

    Args:
      context: with a window.
      order: of the keys, from `key_order`.
      num_queries: the queries are at the positions of the last keys.
    """
    assert context.window is not None
    own = order[:, order.shape[1] - num_queries :]
    first = own - (context.window - 1)
    if context.groups is None or not context.groups_exceed_window:
        return first
    starts = jnp.where(jnp.pad(_goes_on(context.groups), ((0, 0), (1, 0))), jnp.iinfo(jnp.int32).min, own)
    return jnp.minimum(first, jax.lax.cummax(starts, axis=1))


def _goes_on(groups: Int[Array, "B T"]) -> Bool[Array, "B _"]:
    """Whether each position but the last is of the same group as the next one."""
    groups = jnp.asarray(groups)
    return (groups[:, :-1] == groups[:, 1:]) & (groups[:, 1:] != 0)


def key_order(context: Context, num_keys: int) -> Int[Array, "B S"] | Int[Array, "1 S"]:
    """Indices of the keys among the unmasked ones, without those of other branches; windows count them."""
    if context.branches is not None:
        mask = allowed(dataclasses.replace(context, window=None, groups=None), num_keys, num_keys)
        return jnp.sum(cast(Bool[Array, "_ _ _"], mask), axis=2)
    if context.key_segments is None:
        return jnp.arange(num_keys)[None]
    return jnp.cumsum(context.key_segments != PADDING_SEGMENT, axis=1)

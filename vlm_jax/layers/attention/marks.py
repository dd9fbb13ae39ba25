"""The mask as four integers of every query and every key, for kernels that never hold a [T, S] array.

A query reads the keys of its segment, of branch 0 and its own branch, up to the index `last` and from the order `first`
on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from vlm_jax.layers.attention.context import Context, first_order, key_order, last_index

_LOW, _HIGH = np.iinfo(np.int32).min, np.iinfo(np.int32).max
QUERY_PADDING = (_LOW, _HIGH, _LOW, 0)  # reads nothing
KEY_PADDING = (_HIGH, _LOW, _HIGH, 0)  # is read by none


class Marks(NamedTuple):
    """Marks of queries and keys.

    Attributes:
      query: last index, first order, segment and branch.
      key: index, order, segment and branch.
    """

    query: Int[Array, "B 4 T"]
    key: Int[Array, "B 4 S"]


def marks_of(context: Context, batch: int, num_queries: int, num_keys: int) -> Marks:
    """The marks of a whole sequence; the queries are at the positions of the last keys."""
    index = jnp.arange(num_keys)[None]
    last = jnp.full((1, num_queries), _HIGH)
    if context.mask_kind == "causal":
        last = last_index(context, num_queries, num_keys)
    first, order = jnp.full((1, num_queries), _LOW), jnp.zeros((1, num_keys), jnp.int32)
    if context.window is not None:
        order = key_order(context, num_keys)
        first = first_order(context, order, num_queries)
    of_query, of_key = context.query_segments, context.key_segments
    if of_query is None or of_key is None:
        of_query, of_key = jnp.ones((1, num_queries)), jnp.ones((1, num_keys))
    branches = jnp.zeros((1, num_keys)) if context.branches is None else context.branches
    query = _stacked(batch, last, first, of_query, branches[:, :num_queries])
    return Marks(query, _stacked(batch, index, order, of_key, branches))


def _stacked(batch: int, *rows: jax.Array) -> Int[Array, "B 4 T"]:
    return jnp.stack([jnp.broadcast_to(row, (batch, row.shape[1])).astype(jnp.int32) for row in rows], axis=1)


def with_padding(marks: Marks, num_queries: int, num_keys: int) -> Marks:
    """The marks of longer sequences, whose added positions read nothing and are read by none."""
    return Marks(_padded(marks.query, num_queries, QUERY_PADDING), _padded(marks.key, num_keys, KEY_PADDING))


def _padded(marks: Int[Array, "B 4 T"], length: int, values: tuple[int, ...]) -> Int[Array, "B 4 _"]:
    shape = (marks.shape[0], 4, length - marks.shape[2])
    added = jnp.broadcast_to(jnp.asarray(values, jnp.int32)[None, :, None], shape)
    return jnp.concatenate([marks, added], axis=2)


def visible(last, first, of_query, branch_of_query, index, order, of_key, branch_of_key) -> Bool[Array, "..."]:
    """Whether queries read keys; the arguments are marks, of shapes that broadcast to each other."""
    own = (branch_of_key == 0) | (branch_of_key == branch_of_query)
    return (index <= last) & (order >= first) & (of_key == of_query) & own


def visible_blocks(marks: Marks, query_size: int, key_size: int) -> Bool[Array, "B queries keys"]:
    """Whether any query of a block may read a key of another: False only where none does."""
    low_query, high_query = _bounds(marks.query, query_size)
    low_key, high_key = _bounds(marks.key, key_size)
    last, first = high_query[:, 0, :, None], low_query[:, 1, :, None]
    index, order = low_key[:, 0, None], high_key[:, 1, None]
    overlap = (low_query[:, 2, :, None] <= high_key[:, 2, None]) & (low_key[:, 2, None] <= high_query[:, 2, :, None])
    return (index <= last) & (order >= first) & overlap


def _bounds(marks: Int[Array, "B 4 T"], size: int) -> tuple[Int[Array, "B 4 blocks"], Int[Array, "B 4 blocks"]]:
    blocks = marks.reshape(*marks.shape[:2], -1, size)
    return blocks.min(-1), blocks.max(-1)

"""How much attention every token gets in one layer."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.layers.attention import Context, allowed
from vlm_jax.layers.local_rows import row_by_row
from vlm_jax.softcap import capped
from vlm_jax.types import PADDING_SEGMENT

Saliency = Literal["none", "heads", "joined"]  # of an encoder: the mean over heads, or all of them as a single one
_MAX_WEIGHTS = 2**27  # attention weights that are held at once


class Heads(NamedTuple):
    """Queries and keys of one layer, after norms and RoPE."""

    query: Float[Array, "B T Q H"]
    key: Float[Array, "B S K H"]

    def joined(self) -> "Heads":
        """All heads concatenated into one; queries and keys must have equally many heads."""
        return Heads(*(x.reshape(*x.shape[:2], 1, -1) for x in self))


def attention_saliency(heads: Heads, context: Context, weights: Float[Array, "B T"]) -> Float[Array, "B S"]:
    """Softmax attention that each key gets: the mean over heads, and over queries by `weights`; float32.

    Args:
      heads: of the layer; query head q uses key head q // (Q // K).
      context: mask of the layer, without a cache. A masked key gets no attention from the query.
      weights: how much each query counts; 0 throughout gives 0.
    """
    shares = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return _received(heads, context, shares)


def head_saliency(
    heads: Heads, context: Context, weights: Float[Array, "B I T"], factors: Float[Array, "B T S"] | None = None
) -> Float[Array, "B I Q S"]:
    """Softmax attention that each key gets by head, for several weightings of the queries; float32.

    Args:
      heads, context: as of `attention_saliency`.
      weights: how much each query counts; 0 throughout gives 0.
      factors: of each query's attention to each key, after the softmax, or None.
    """
    shares = weights / jnp.maximum(weights.sum(axis=2, keepdims=True), jnp.finfo(jnp.float32).tiny)
    given = (jnp.moveaxis(shares, 2, 1),) if factors is None else (jnp.moveaxis(shares, 2, 1), factors)

    def summed(attended: jax.Array, shares: jax.Array, factors: jax.Array | None = None) -> jax.Array:
        attended = attended if factors is None else attended * factors[:, None, None]
        return jnp.einsum("bkgts,bti->bikgs", attended, shares)

    found = _over_queries(heads, context, summed, *given)
    return found.reshape(*found.shape[:2], -1, found.shape[-1])


def segment_saliency(heads: Heads, context: Context, queries: Bool[Array, "B T"] | None = None) -> Float[Array, "B T"]:
    """Softmax attention that each token gets: the mean over heads, and over the queries of its segment; float32.

    Args:
      heads: of the layer, with as many queries as keys.
      context: full attention inside segments, and inside blocks; padding is excluded.
      queries: which queries count, where those of a segment are not all alike; all when None.
    """
    if context.block is not None:
        shape = heads.query.shape[:2]
        folded = Heads(*(x.reshape(-1, context.block, *x.shape[2:]) for x in heads))
        chosen = None if queries is None else queries.reshape(-1, context.block)
        return segment_saliency(folded, context.of_blocks(), chosen).reshape(shape)
    segments = context.query_segments
    if segments is None:
        every = jnp.ones(heads.query.shape[:2]) if queries is None else queries.astype(jnp.float32)
        return attention_saliency(heads, context, every)
    if queries is not None:
        segments = jnp.where(queries, segments, PADDING_SEGMENT)
    real = segments != PADDING_SEGMENT
    return _received(heads, context, real / jnp.maximum(_sizes(segments), 1))


@row_by_row
def _sizes(segments: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Number of tokens in the segment of each token."""
    # Segment ids of a row count up to its length at most.
    row = jnp.arange(segments.shape[0])[:, None]
    counts = jnp.zeros((segments.shape[0], segments.shape[1] + 1)).at[row, segments].add(1.0, mode="drop")
    return jnp.take_along_axis(counts, segments, axis=1)


def _received(heads: Heads, context: Context, shares: Float[Array, "B T"]) -> Float[Array, "B S"]:
    """Sum over queries of their share times the mean weight of the heads."""
    count = heads.query.shape[2]

    def summed(attended: jax.Array, shares: jax.Array) -> jax.Array:
        return jnp.einsum("bts,bt->bs", attended.sum(axis=(1, 2)) / count, shares)

    return _over_queries(heads, context, summed, shares)


def _over_queries(heads: Heads, context: Context, summed: Callable[..., jax.Array], *given: jax.Array) -> jax.Array:
    """The sum over queries of a function of attention weights; many queries are processed in blocks.

    Args:
      heads, context: as of `attention_saliency`.
      summed: of weights [B, K, G, T, S] and arrays [B, T, ..] of some queries.
      given: these arrays of all queries; zeros of the first one add nothing.
    """
    query, key = (x.astype(jnp.float32) for x in heads)
    batch, length, count, dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, dim) * dim**-0.5
    mask = allowed(context, length, key.shape[1])

    def of_block(block):
        grouped, mask, *given = block
        logits = capped(jnp.einsum("btkgh,bskh->bkgts", grouped, key), context.softcap)
        if mask is not None:
            mask = mask[:, None, None]
            logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        attended = jax.nn.softmax(logits, axis=-1)
        if mask is not None:
            attended = jnp.where(mask, attended, 0)
        return summed(attended, *given)

    size = max(1, _MAX_WEIGHTS // (batch * count * key.shape[1]))
    if size >= length:
        return of_block((grouped, mask, *given))
    blocks = -(-length // size)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, blocks * size - length), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)

    mask = None if mask is None else cut(mask)
    return jax.lax.map(of_block, (cut(grouped), mask, *map(cut, given))).sum(axis=0)

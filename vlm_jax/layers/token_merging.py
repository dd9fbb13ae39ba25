"""Bipartite soft matching: merges the most similar tokens of a sequence between attention and feed-forward."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.layers.attention import Context
from vlm_jax.layers.block import TransformerStack
from vlm_jax.types import struct

# Scores outside the range of cosines: tokens to merge first, and tokens to merge only if no others are left.
_FIRST, _LAST = 2.0, -2.0


def merge_schedule(count: int, kept: int, num_layers: int) -> tuple[int, ...] | None:
    """Tokens to merge in each layer so that `kept` of `count` remain, or None where that is impossible.

    The same number in every layer, the smallest that suffices, but at most half of the tokens;
    the last layers merge the remainder.
    """
    for constant in range(count):
        left, schedule = count, []
        for _ in range(num_layers):
            schedule.append(min(constant, left // 2, left - kept))
            left -= schedule[-1]
        if left == kept:
            return tuple(schedule)
    return None


@struct
class Merged:
    """Tokens, each the mean of one or more patches.

    Attributes:
      x: the tokens.
      size: number of patches merged into each; 0 for padding.
      place: original index of each.
      segments: segment ids; 0 is padding. None where there is one segment.
    """

    x: Float[Array, "B T D"]
    size: Float[Array, "B T"]
    place: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None


def run_merging(
    stack: TransformerStack,
    x: Float[Array, "B T D"],
    segments: Int[Array, "B T"] | None,
    counts: tuple[int, ...],
    *,
    num_prefix: int,
    released: bool = False,
    proportional: bool = True,
    angles: Float[Array, "B T half"] | None = None,
) -> Merged:
    """Runs the blocks of a stack, merging counts[i] tokens in block i; tokens are returned in their original order.

    Args:
      stack: with len(counts) blocks; the parameters are the same as without merging.
      x: prefix tokens, then patches.
      segments: as in `Context`.
      counts: tokens to merge in each block, at most half of the patches that it receives.
      num_prefix: tokens at the start that are never merged, and into which nothing is merged.
      released: returns tokens in the order of the released code; see `merge`.
      proportional: keys are weighted in attention by the number of patches merged into them.
      angles: rotary angles of x, or None. A merged token has those of the first of its tokens.

    Source: Bolya et al. 2023 (ToMe), section 3; tome/merge.py and tome/patch/timm.py. Deviation unless
    `released`: the order of tokens.
    """
    batch, length, _ = x.shape
    size = jnp.ones((batch, length)) if segments is None else (segments > 0).astype(jnp.float32)
    place = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    tokens = Merged(x, size, place, segments)
    for layer, count in enumerate(counts):
        bias = jnp.log(jnp.maximum(tokens.size, 1)) if proportional else None
        own = None if angles is None else _take(angles, tokens.place)
        context = Context("full", tokens.segments, tokens.segments, angles=own, key_bias=bias)
        x, _, heads = stack.attend(tokens.x, context, layer)
        tokens = dataclasses.replace(tokens, x=x)
        if count:
            tokens = merge(tokens, heads.key, count, num_prefix=num_prefix, released=released)
        tokens = dataclasses.replace(tokens, x=stack.feed_forward(tokens.x, layer))
    if released:
        return tokens
    order = jnp.argsort(tokens.place, axis=1)
    return jax.tree.map(lambda leaf: _take(leaf, order), tokens)


class Matching(NamedTuple):
    """Assigns tokens of the first set (even positions) to the tokens of the second (odd ones) they are merged into.

    Attributes:
      stays: indices in the first set of the tokens that are not merged.
      source: indices in the first set of the merged tokens, the most similar to its target first.
      target: index in the second set of the target of each merged token.
    """

    stays: Int[Array, "B U"]
    source: Int[Array, "B C"]
    target: Int[Array, "B C"]


def match(
    metric: Float[Array, "B T H"],
    segments: Int[Array, "B T"] | None,
    count: int,
    *,
    num_prefix: int,
    released: bool = False,
) -> Matching:
    """Matches each token of the first set with the nearest token of the second by cosine.

    Padding is merged first, into any token, and tokens of different segments last.

    Args:
      metric: vectors to compare.
      segments: 0 is padding; None where there is one segment.
      count: number of tokens to merge.
      num_prefix: tokens at the start that are never merged, and into which nothing is merged.
      released: without a prefix, unmerged tokens are in descending similarity, as in the released code; else in order.
    """
    metric = metric / jnp.maximum(jnp.linalg.norm(metric, axis=-1, keepdims=True), 1e-12)
    scores = jnp.einsum("bth,bsh->bts", metric[:, ::2], metric[:, 1::2])
    if segments is not None:
        first, second = segments[:, ::2, None], segments[:, None, 1::2]
        scores = jnp.where(first == second, scores, _LAST)
        scores = jnp.where(first == 0, _FIRST, scores)
    scores = scores.at[:, : -(-num_prefix // 2)].set(-jnp.inf).at[:, :, : num_prefix // 2].set(-jnp.inf)
    best = jnp.max(scores, axis=-1)
    order = jax.lax.top_k(best, best.shape[1])[1]
    source, stays = order[:, :count], order[:, count:]
    if num_prefix or not released:
        stays = jnp.sort(stays, axis=1)
    return Matching(stays, source, jnp.take_along_axis(jnp.argmax(scores, axis=-1), source, axis=1))


def merge(
    tokens: Merged, key: Float[Array, "B T K H"], count: int, *, num_prefix: int, released: bool = False
) -> Merged:
    """Merges `count` tokens of the first set (even positions) into the second (odd positions).

    Each token of the first set is matched with the token of the second whose key, averaged over heads, is nearest
    by cosine; the `count` nearest pairs become their mean, weighted by size. Padding is merged first, into
    any token, and changes nothing.

    Returns:
      The unmerged tokens of the first set, in the order of `match`, and then the second set.
    """
    metric = jax.lax.stop_gradient(key).astype(jnp.float32).mean(axis=2)
    stays, source, target = match(metric, tokens.segments, count, num_prefix=num_prefix, released=released)
    row = jnp.arange(metric.shape[0])[:, None]

    def joined(leaf, reduce):
        left, second = _take(leaf[:, ::2], stays), reduce(leaf[:, 1::2].at[row, target], leaf[:, ::2])
        parts = []
        for index in range(num_prefix):  # the prefix stays in front
            parts.append((second if index % 2 else left)[:, index // 2 : index // 2 + 1])
        rest = left[:, -(-num_prefix // 2) :], second[:, num_prefix // 2 :]
        return jnp.concatenate([*parts, *rest], axis=1)

    def added(place, first):
        return place.add(_take(first, source))

    size = joined(tokens.size, added)
    weighted = joined(tokens.x.astype(jnp.float32) * tokens.size[..., None], added)
    x = (weighted / jnp.maximum(size, 1)[..., None]).astype(tokens.x.dtype)
    segments = tokens.segments
    if segments is not None:
        segments = joined(segments, lambda place, first: place.max(_take(first, source)))
    kept = joined(tokens.place, lambda place, first: place.min(jnp.iinfo(jnp.int32).max))
    return Merged(x, size, kept, segments)


def _take(leaf: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(leaf, index.reshape(*index.shape, *(1,) * (leaf.ndim - 2)), axis=1)

"""Bipartite soft matching: the most similar tokens of a sequence become one, between attention and feed-forward."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.layers.attention import Context
from vlm_jax.layers.block import TransformerStack
from vlm_jax.types import struct

# Beyond any cosine: what is merged before everything else, and what only for want of anything else.
_FIRST, _LAST = 2.0, -2.0


def merge_schedule(count: int, kept: int, num_layers: int) -> tuple[int, ...] | None:
    """Tokens to be merged in every layer so that `kept` of `count` are left, or None where it cannot be.

    The same number in every layer, the smallest that suffices, but never more than half of what is there;
    the last layers merge what is left to merge.
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
    """Tokens that stand for several.

    Attributes:
      x: the tokens.
      size: how many patches each stands for; 0 for padding.
      place: where each stood at first.
      segments: segment ids; 0 is padding. None where all is one segment.
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
) -> Merged:
    """Runs the blocks of a stack, merging counts[i] tokens in block i; tokens come back in their first order.

    Args:
      stack: its depth is that of `counts`; the parameters are those of a run without merging.
      x: the prefix, then patches.
      segments: as in `Context`.
      counts: of every block, at most half of the patches that reach it.
      num_prefix: 1 where the first token is never merged, 2 where nothing is merged into the second either, else 0.
      released: tokens come back as the released code leaves them; see `merge`.
      proportional: keys weigh in attention by the number of patches that they stand for.

    Source: Bolya et al. 2023 (ToMe), section 3; tome/merge.py and tome/patch/timm.py. Deviation unless
    `released`: the order of tokens.
    """
    batch, length, _ = x.shape
    size = jnp.ones((batch, length)) if segments is None else (segments > 0).astype(jnp.float32)
    place = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    tokens = Merged(x, size, place, segments)
    for layer, count in enumerate(counts):
        bias = jnp.log(jnp.maximum(tokens.size, 1)) if proportional else None
        context = Context("full", tokens.segments, tokens.segments, key_bias=bias)
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
    """Which tokens of the first set, every other one from the first, are merged into which of the second, the others.

    Attributes:
      stays: numbers in the first set of those that stay.
      source: of those that are merged, the most similar to its target first.
      target: number in the second set that each of these goes to.
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
    """Matches each token of the first set with that of the second that is nearest to it by cosine.

    Padding goes first, into anything, and tokens of different segments last.

    Args:
      metric: what is compared.
      segments: 0 is padding; None where all is one segment.
      count: how many are merged.
      num_prefix: 1 where the first token is never merged; 2 where nothing is merged into the second either.
      released: without a prefix those that stay come by falling similarity, as in the released code; else in order.
    """
    metric = metric / jnp.maximum(jnp.linalg.norm(metric, axis=-1, keepdims=True), 1e-12)
    scores = jnp.einsum("bth,bsh->bts", metric[:, ::2], metric[:, 1::2])
    if segments is not None:
        first, second = segments[:, ::2, None], segments[:, None, 1::2]
        scores = jnp.where(first == second, scores, _LAST)
        scores = jnp.where(first == 0, _FIRST, scores)
    if num_prefix:
        scores = scores.at[:, 0].set(-jnp.inf)
    if num_prefix > 1:
        scores = scores.at[:, :, 0].set(-jnp.inf)
    best = jnp.max(scores, axis=-1)
    order = jax.lax.top_k(best, best.shape[1])[1]
    source, stays = order[:, :count], order[:, count:]
    if num_prefix or not released:
        stays = jnp.sort(stays, axis=1)
    return Matching(stays, source, jnp.take_along_axis(jnp.argmax(scores, axis=-1), source, axis=1))


def merge(
    tokens: Merged, key: Float[Array, "B T K H"], count: int, *, num_prefix: int, released: bool = False
) -> Merged:
    """Merges `count` tokens of the first set, every other one from the first, into the rest.

    Each token of the first set looks for the token of the second whose key, averaged over heads, is nearest
    by cosine; the `count` nearest pairs become their mean, weighted by size. Padding goes first, into
    anything, and changes nothing.

    Returns:
      What stays of the first set, in order or as `match` says, and then the second.
    """
    metric = jax.lax.stop_gradient(key).astype(jnp.float32).mean(axis=2)
    stays, source, target = match(metric, tokens.segments, count, num_prefix=num_prefix, released=released)
    row = jnp.arange(metric.shape[0])[:, None]

    def joined(leaf, reduce):
        left, second = _take(leaf[:, ::2], stays), reduce(leaf[:, 1::2].at[row, target], leaf[:, ::2])
        if num_prefix > 1:  # the prefix stays in front
            return jnp.concatenate([left[:, :1], second[:, :1], left[:, 1:], second[:, 1:]], axis=1)
        return jnp.concatenate([left, second], axis=1)

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

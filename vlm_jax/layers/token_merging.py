"""Bipartite soft matching: the most similar tokens of a sequence become one, between attention and feed-forward."""

import dataclasses

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
) -> Merged:
    """Runs the blocks of a stack, merging counts[i] tokens in block i; tokens come back in their first order.

    Keys weigh in attention by the number of patches that they stand for.

    Args:
      stack: its depth is that of `counts`; the parameters are those of a run without merging.
      x: the prefix, then patches.
      segments: as in `Context`.
      counts: of every block, at most half of the patches that reach it.
      num_prefix: 1 where the first token is never merged, else 0.

    Source: Bolya et al. 2023 (ToMe), section 3; tome/merge.py and tome/patch/timm.py. Deviation: tokens
    that stay in the first set keep their order also without a class token.
    """
    batch, length, _ = x.shape
    size = jnp.ones((batch, length)) if segments is None else (segments > 0).astype(jnp.float32)
    place = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    tokens = Merged(x, size, place, segments)
    for layer, count in enumerate(counts):
        bias = jnp.log(jnp.maximum(tokens.size, 1))
        context = Context("full", tokens.segments, tokens.segments, key_bias=bias)
        x, _, heads = stack.attend(tokens.x, context, layer)
        tokens = dataclasses.replace(tokens, x=x)
        if count:
            tokens = merge(tokens, heads.key, count, num_prefix=num_prefix)
        tokens = dataclasses.replace(tokens, x=stack.feed_forward(tokens.x, layer))
    order = jnp.argsort(tokens.place, axis=1)
    return jax.tree.map(lambda leaf: _take(leaf, order), tokens)


def merge(tokens: Merged, key: Float[Array, "B T K H"], count: int, *, num_prefix: int) -> Merged:
    """Merges `count` tokens of the first set, every other one from the first, into the rest.

    Each token of the first set looks for the token of the second whose key, averaged over heads, is nearest
    by cosine; the `count` nearest pairs become their mean, weighted by size. Padding goes first, into
    anything, and changes nothing.

    Returns:
      What stays of the first set, in order, and then the second.
    """
    metric = jax.lax.stop_gradient(key).astype(jnp.float32).mean(axis=2)
    metric = metric / jnp.maximum(jnp.linalg.norm(metric, axis=-1, keepdims=True), 1e-12)
    scores = jnp.einsum("bth,bsh->bts", metric[:, ::2], metric[:, 1::2])
    if tokens.segments is not None:
        first, second = tokens.segments[:, ::2, None], tokens.segments[:, None, 1::2]
        scores = jnp.where(first == second, scores, _LAST)
        scores = jnp.where(first == 0, _FIRST, scores)
    if num_prefix:
        scores = scores.at[:, 0].set(-jnp.inf)
    partner = jnp.argmax(scores, axis=-1)
    source = jax.lax.top_k(jnp.max(scores, axis=-1), count)[1]
    target = jnp.take_along_axis(partner, source, axis=1)
    row = jnp.arange(scores.shape[0])[:, None]
    goes = jnp.zeros(scores.shape[:2], bool).at[row, source].set(True)
    stays = jnp.argsort(goes, axis=1)[:, : scores.shape[1] - count]  # stable, so in order

    def joined(leaf, reduce):
        second = leaf[:, 1::2]
        return jnp.concatenate([_take(leaf[:, ::2], stays), reduce(second.at[row, target], leaf[:, ::2])], axis=1)

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

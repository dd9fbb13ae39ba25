"""Choosing the visual tokens that are least like a few pivots, for drops between a decoder's layers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.types import PADDING_SEGMENT, VisualPlaces


class Pivots(NamedTuple):
    """The pivots of every image, those among its tokens first, each kind by falling norm.

    Attributes:
      index: index in the row.
      used: False where an image, or the text after it, has fewer.
    """

    index: Int[Array, "B I P"]
    used: Bool[Array, "B I P"]


def pivots_of(
    keys: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    places: VisualPlaces,
    number: Int[Array, "B I"],
    counts: tuple[int, int],
) -> Pivots:
    """The tokens of every image, and of the text after it, whose keys have the largest L1 norm.

    Text counts up to the end of the instruction, so that an answer does not choose what it is given from.

    Args:
      keys: of all heads.
      segment_ids: as in `Batch`.
      places: of the visual tokens, and of the ends of instructions.
      number: tokens of each image to keep; no more of them are pivots.
      counts: pivots of an image, and of the text.
    """
    norm = jnp.abs(jax.lax.stop_gradient(keys).astype(jnp.float32)).sum(axis=(2, 3))
    length, tokens = norm.shape[1], places.index.shape[2]
    real = real_tokens(segment_ids, places)
    index = jnp.minimum(places.index, length - 1)
    of_image = jnp.where(real, at(norm, index), -jnp.inf)
    text = text_behind(segment_ids, places)
    of_text = jnp.where(text, norm[:, None], -jnp.inf)
    images, texts = min(counts[0], tokens), min(counts[1], length)
    first = jnp.argsort(-of_image, axis=-1)[..., :images]
    second = jnp.argsort(-of_text, axis=-1)[..., :texts]
    of_first = jnp.take_along_axis(real, first, axis=-1) & (jnp.arange(images)[None, None] < number[..., None])
    of_second = jnp.take_along_axis(text, second, axis=-1)
    return Pivots(
        jnp.concatenate([jnp.take_along_axis(index, first, axis=-1), second], axis=-1),
        jnp.concatenate([of_first, of_second], axis=-1),
    )


def text_behind(segment_ids: Int[Array, "B T"], places: VisualPlaces) -> Bool[Array, "B I T"]:
    """The text after every image, up to the end of the instruction; none of it is after an image without tokens."""
    batch, length = segment_ids.shape
    real, index = real_tokens(segment_ids, places), jnp.minimum(places.index, length - 1)
    visual = jnp.zeros((batch, length + 1), bool)
    visual = visual.at[jnp.arange(batch)[:, None, None], places.index].set(True)[:, :length]
    last = jnp.max(jnp.where(real, index, -1), axis=-1)
    ends = jnp.cumsum(places.ranking, axis=1)
    ended = (ends - places.ranking)[:, None] > at(ends, jnp.maximum(last, 0))[..., None]
    same = segment_ids[:, None] == at(segment_ids, jnp.maximum(last, 0))[..., None]
    behind = (last[..., None] >= 0) & (jnp.arange(length)[None, None] > last[..., None])
    return behind & same & ~ended & ~visual[:, None]


def unlike_pivots(
    states: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"],
    places: VisualPlaces,
    pivots: Pivots,
    number: Int[Array, "B I"],
) -> Bool[Array, "B T"]:
    """True at the tokens to keep: an image's pivots, and for each pivot in turn the tokens least like it by cosine.

    The pivots share what is left of `number` equally; the first ones get one more where it does not divide.
    """
    batch, length = segment_ids.shape
    states = jax.lax.stop_gradient(states).astype(jnp.float32)
    units = states / jnp.maximum(jnp.linalg.norm(states, axis=-1, keepdims=True), 1e-8)
    real = real_tokens(segment_ids, places)
    index = jnp.minimum(places.index, length - 1)
    of_pivots, of_tokens = at(units, pivots.index), at(units, index)
    cosines = jnp.einsum("bipd,bimd->pbim", of_pivots, of_tokens, precision="highest")
    matches = (pivots.index[..., None] == index[:, :, None]) & pivots.used[..., None]
    taken = matches.any(axis=2) & real
    rest = jnp.maximum(number - taken.sum(axis=-1), 0)
    users = jnp.maximum(pivots.used.sum(axis=-1), 1)
    turn = jnp.cumsum(pivots.used, axis=-1) - 1
    shares = (rest // users)[..., None] + (turn < (rest % users)[..., None])
    shares = jnp.where(pivots.used, shares, 0)

    def take(taken: Bool[Array, "B I M"], given: tuple[Float[Array, "B I M"], Int[Array, "B I"]]):
        cosines, share = given
        rank = jnp.argsort(jnp.argsort(jnp.where(real & ~taken, cosines, jnp.inf), axis=-1), axis=-1)
        return taken | (real & (rank < share[..., None])), None

    taken, _ = jax.lax.scan(take, taken, (cosines, jnp.moveaxis(shares, -1, 0)))
    row = jnp.arange(batch)[:, None, None]
    return jnp.zeros((batch, length + 1), bool).at[row, places.index].set(taken)[:, :length]


def real_tokens(segment_ids: Int[Array, "B T"], places: VisualPlaces) -> Bool[Array, "B I M"]:
    """Which places hold a visual token that is not padding."""
    length = segment_ids.shape[1]
    shown = at(segment_ids, jnp.minimum(places.index, length - 1)) != PADDING_SEGMENT
    return shown & (places.index < length)


def at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b, ..]]."""
    row = jnp.arange(len(x)).reshape(-1, *(1,) * (index.ndim - 1))
    return x[row, index]

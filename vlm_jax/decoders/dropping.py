"""Dropping visual tokens between a decoder's layers: rows get shorter, by a number that is known."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.types import PADDING_SEGMENT, VisualPlaces, struct


@struct
class Rows:
    """What a decoder carries from layer to layer, of each position that is left.

    Attributes:
      x: activations.
      angles: rotary angles.
      query_scale: factor of its queries, or None.
      segment_ids, branch_ids: as in `Batch`.
      index: which position of the whole sequence it is.
    """

    x: Float[Array, "B T D"]
    angles: Float[Array, "B T half"]
    query_scale: Float[Array, "B T"] | None
    segment_ids: Int[Array, "B T"]
    branch_ids: Int[Array, "B T"] | None
    index: Int[Array, "B T"]


def num_dropped(places: VisualPlaces, num_kept: int) -> int:
    """Positions by which a row gets shorter when `num_kept` tokens of each image are left."""
    images, tokens = places.index.shape[1:]
    return images * (tokens - num_kept)


def drop(rows: Rows, places: VisualPlaces, saliency: Float[Array, "B T"], num_kept: int) -> tuple[Rows, VisualPlaces]:
    """Keeps of every image the `num_kept` tokens with most attention, and everything that is no visual token.

    Tokens stay in order; of equal ones the first is kept; padding goes before any real token. A row in which
    tokens have no place loses padding in their stead, of which it must have as much.

    Args:
      rows: T positions.
      places: where the tokens stand, and what must stay.
      saliency: attention that each position gets.
      num_kept: at most as many as an image has.

    Returns:
      Rows of T - num_dropped(places, num_kept) positions, and the places in them.
    """
    batch, length = saliency.shape
    row = jnp.arange(batch)[:, None, None]
    value = jnp.where(rows.segment_ids == PADDING_SEGMENT, -1.0, jax.lax.stop_gradient(saliency))
    value = jnp.where(places.ranking, jnp.inf, value)
    value = jnp.pad(value, ((0, 0), (0, 1)), constant_values=-2.0)  # of a token without a place
    best = jnp.sort(jax.lax.top_k(value[row, places.index], num_kept)[1], axis=-1)
    kept = jnp.take_along_axis(places.index, best, axis=-1)
    lost = jnp.zeros((batch, length + 1), bool).at[row, places.index].set(True).at[row, kept].set(False)[:, :length]
    going = jnp.where(lost, 2, jnp.where(rows.segment_ids == PADDING_SEGMENT, 1, 0))
    left = jnp.sort(jnp.argsort(going, axis=1)[:, : length - num_dropped(places, num_kept)], axis=1)

    moved = jnp.full((batch, length + 1), left.shape[1]).at[row[..., 0], left].set(jnp.arange(left.shape[1])[None])
    shorter = jax.tree.map(lambda leaf: _take(leaf, left), rows)
    return shorter, VisualPlaces(moved[row, kept], _take(places.ranking, left))


def restore(x: Float[Array, "B T D"], rows: Rows, length: int) -> Float[Array, "B S D"]:
    """Activations of all `length` positions; zeros where tokens were dropped."""
    row = jnp.arange(x.shape[0])[:, None]
    return jnp.zeros((x.shape[0], length, x.shape[2]), x.dtype).at[row, rows.index].set(x)


def _take(leaf: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(leaf, index.reshape(*index.shape, *(1,) * (leaf.ndim - 2)), axis=1)

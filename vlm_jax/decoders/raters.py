"""Rating visual tokens by some of the text after them, and merging those that are dropped (SparseVLM)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.decoders.duplicates import at, real_tokens, text_behind
from vlm_jax.layers.attention import Context
from vlm_jax.layers.density_peaks import distances, nearest_centers, peak_scores, ranks
from vlm_jax.layers.saliency import Heads, head_saliency
from vlm_jax.types import PADDING_SEGMENT, Numbers, Rating, VisualPlaces


class Rated(NamedTuple):
    """What a drop leaves, before it is made.

    Attributes:
      x: activations, with merged tokens at the places of their centres.
      left: True at the kept and the merged tokens.
      source: index from which each position takes its activation.
    """

    x: Float[Array, "B T D"]
    left: Bool[Array, "B T"]
    source: Int[Array, "B T"]


class Counts(NamedTuple):
    """`types.Numbers` of every image."""

    present: Int[Array, "B I"]
    kept: Int[Array, "B I"]
    candidates: Int[Array, "B I"]
    merged: Int[Array, "B I"]


class Clusters(NamedTuple):
    """Clusters of some tokens, by falling score of their centres; what is past their number means nothing.

    Attributes:
      centers: index of each cluster's centre.
      assigned: cluster of each token.
      means: of each cluster's tokens.
    """

    centers: Int[Array, "*images G"]
    assigned: Int[Array, "*images N"]
    means: Float[Array, "*images G D"]


def raters_of(
    embeddings: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], places: VisualPlaces
) -> Bool[Array, "B I T"]:
    """Of every image the tokens of its text that are more like it than the mean; all of them where none is.

    A token's likeness is its softmax over the text of products with visual tokens, averaged over these.

    Args:
      embeddings: input of the decoder.
      segment_ids, places: of the whole rows.
    """
    x = jax.lax.stop_gradient(embeddings).astype(jnp.float32)
    text, real = text_behind(segment_ids, places), real_tokens(segment_ids, places)
    visual = at(x, jnp.minimum(places.index, x.shape[1] - 1))
    products = jnp.einsum("bimd,btd->bimt", visual, x, precision="highest")
    products = jnp.where(text[:, :, None], products, jnp.finfo(jnp.float32).min)
    shares = jnp.where(real[..., None], jax.nn.softmax(products, axis=-1), 0)
    likeness = shares.sum(axis=2) / jnp.maximum(real.sum(axis=2), 1)[..., None]
    mean = jnp.where(text, likeness, 0).sum(axis=2) / jnp.maximum(text.sum(axis=2), 1)
    found = text & (likeness > mean[..., None])
    return jnp.where(found.any(axis=2, keepdims=True), found, text)


def relevance(
    heads: Heads, context: Context, raters: Bool[Array, "B I T"], places: VisualPlaces, rating: Rating
) -> Float[Array, "B I M"]:
    """The attention that every visual token gets from its image's raters: the mean over them, and over heads."""
    factors = _rotary_factors(context, heads.query.shape[-1]) if rating.without_rotary else None
    received = head_saliency(heads, context, raters.astype(jnp.float32), factors)
    index = jnp.minimum(places.index, received.shape[-1] - 1)
    found = jnp.take_along_axis(received, index[:, :, None], axis=-1)
    if rating.num_heads is not None and rating.num_heads < found.shape[2]:
        exists = (places.index < received.shape[-1])[:, :, None]
        best = jax.lax.top_k(jnp.where(exists, found, 0).sum(axis=-1), rating.num_heads)[1]
        found = jnp.take_along_axis(found, best[..., None], axis=2)
    return found.mean(axis=2)


def _rotary_factors(context: Context, head_dim: int) -> Float[Array, "B T T"]:
    """1 over the scaled score of a query of ones with a key of ones."""
    assert context.angles is not None
    cos, sin = jnp.cos(context.angles), jnp.sin(context.angles)
    turned = jnp.concatenate([cos, sin], axis=-1)
    pairs = jnp.einsum("bth,bsh->bts", turned, turned, precision="highest")
    plain = head_dim - 2 * context.angles.shape[-1]  # coordinates that are not rotated
    return head_dim**0.5 / (2 * context.magnitude**2 * pairs + plain)


def numbers_of(whole: VisualPlaces, rating: Rating) -> tuple[Counts, Numbers]:
    """Numbers of every image at a drop, and the largest of each, from the places before the first drop."""
    table = [rating.numbers(count) for count in range(whole.index.shape[2] + 1)]
    counts = jnp.sum(whole.index < whole.ranking.shape[1], axis=-1)
    columns = list(zip(*table, strict=True))
    return Counts(*(jnp.asarray(column, jnp.int32)[counts] for column in columns)), Numbers(*map(max, columns))


def rated(
    x: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"],
    places: VisualPlaces,
    scores: Float[Array, "B I M"],
    whole: VisualPlaces,
    rating: Rating,
) -> Rated:
    """Keeps the tokens of every image with the highest scores, and merges the best of the others.

    Args:
      x, segment_ids, places: before the drop.
      scores: of each token.
      whole: places before the first drop.
      rating: of the drop.
    """
    (batch, length), tokens = segment_ids.shape, places.index.shape[2]
    numbers, most = numbers_of(whole, rating)
    order = jnp.argsort(-jnp.where(real_tokens(segment_ids, places), scores, -jnp.inf), axis=-1)
    by_rank = jnp.take_along_axis(places.index, order, axis=-1)
    chosen = jnp.where(jnp.arange(tokens)[None, None] < numbers.kept[..., None], by_rank, length)
    row = jnp.arange(batch)[:, None, None]
    source = jnp.broadcast_to(jnp.arange(length)[None], segment_ids.shape)
    if most.merged:
        rank = numbers.kept[..., None] + jnp.arange(most.candidates)[None, None]
        index = jnp.take_along_axis(by_rank, jnp.minimum(rank, tokens - 1), axis=-1)
        inside = jnp.minimum(index, length - 1)
        given = jnp.arange(most.candidates)[None, None] < numbers.candidates[..., None]
        given &= at(segment_ids, inside) != PADDING_SEGMENT
        noise = tie_noise(most.candidates) if rating.as_released else None
        found = cluster(at(x, inside), given, numbers.merged, most.merged, noise)
        used = jnp.arange(most.merged)[None, None] < numbers.merged[..., None]
        used &= jnp.take_along_axis(given, found.centers, axis=-1)
        centers = jnp.where(used, jnp.take_along_axis(index, found.centers, axis=-1), length)
        x = x.at[row, centers].set(found.means.astype(x.dtype), mode="drop")
        contents = jnp.concatenate([jnp.sort(chosen, axis=-1), centers], axis=-1)
        chosen = jnp.concatenate([chosen, centers], axis=-1)
        if rating.as_released:
            contents = jnp.take_along_axis(contents, jnp.argsort(contents == length, axis=-1), axis=-1)
            source = source.at[row, jnp.sort(chosen, axis=-1)].set(contents, mode="drop")
            x = at(x, source)
    left = jnp.zeros((batch, length), bool).at[row, chosen].set(True, mode="drop")
    return Rated(x, left, source)


def tie_noise(count: int) -> Float[Array, "N"]:
    """What is added to densities so that none are equal: the same for every image and call."""
    return 1e-6 * jax.random.uniform(jax.random.key(0), (count,))


def cluster(
    x: Float[Array, "B I N D"],
    mask: Bool[Array, "B I N"],
    number: Int[Array, "B I"],
    most: int,
    noise: Float[Array, "N"] | None,
) -> Clusters:
    """Density-peak clustering: centres are dense, and far from denser tokens.

    Args:
      x: tokens.
      mask: True where a token is real.
      number: clusters of each image, and neighbours by which its densities are estimated.
      most: the largest number.
      noise: added to the densities, as released; a mean's divisor then has a small addend too.

    Source: Du et al. 2016 (DPC-KNN), as SparseVLM has it; llava/model/language_model/utils.py, cluster_and_merge.
    """
    found = jax.vmap(jax.vmap(functools.partial(_clusters, most=most, noise=noise)))
    return found(jnp.where(mask[..., None], x, 0).astype(jnp.float32), mask, number)


def _clusters(
    x: Float[Array, "N D"], mask: Bool[Array, "N"], number: Int[Array, ""], most: int, noise: Float[Array, "N"] | None
) -> Clusters:
    """Those of one image."""
    distance, pairs = distances(x), mask[:, None] & mask[None]
    rank = ranks(peak_scores(distance, pairs, most, number, noise), pairs)
    joined = nearest_centers(distance, pairs, rank < number, rank)
    assigned = jnp.where(joined < len(x), rank[jnp.minimum(joined, len(x) - 1)], most)
    member = assigned[None] == jnp.arange(most)[:, None]
    sizes = jnp.maximum(member.sum(axis=1), 1) + (0 if noise is None else 1e-6)
    means = jnp.matmul(member.astype(jnp.float32), x, precision="highest") / sizes[:, None]
    return Clusters(jnp.argsort(rank)[:most], assigned, means)

"""Recall at k of retrieval between images and texts, in both directions."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from vlm_jax.types import Array


@jax.jit
def _ranks(queries: Array, query_groups: Array, candidates: Array, candidate_groups: Array) -> jax.Array:
    """Number of wrong candidates at least as similar to each query as its best correct one."""
    similarity = jnp.einsum("qd,cd->qc", queries, candidates, precision="highest")
    right = query_groups[:, None] == candidate_groups[None, :]
    best = jnp.max(jnp.where(right, similarity, -jnp.inf), axis=1)
    return jnp.sum(~right & (similarity >= best[:, None]), axis=1)


def _all_ranks(queries, query_groups, candidates, candidate_groups, block_size) -> np.ndarray:
    ranks = [
        np.asarray(
            _ranks(
                *(x[start : start + block_size] for x in (queries, query_groups)),
                candidates,
                candidate_groups,
            )
        )
        for start in range(0, len(queries), block_size)
    ]
    return np.concatenate(ranks)


def retrieval_ranks(
    image_features: Float[Array, "..."],
    text_features: Float[Array, "..."],
    text_image: Int[Array, "..."] | None = None,
    *,
    block_size: int = 1024,
) -> dict[str, np.ndarray]:
    """Number of wrong candidates at least as similar to each query as its best correct one, in both directions.

    Args:
      image_features: [I, D] float, normalised by the caller.
      text_features: [T, D] float, normalised by the caller.
      text_image: [T] int, in [0, I): the image that each text describes; None: text i describes
        image i.
      block_size: queries whose similarities to all candidates are in memory at a time.

    Returns:
      {"image_to_text": [I] int, "text_to_image": [T] int}.

    Raises:
      ValueError: incompatible shapes, features that are not finite, a text without an image, an image
        without text, a block size below 1.
    """
    images, texts = (np.asarray(x, np.float32) for x in (image_features, text_features))
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(f"expected image and text features [I, D] and [T, D], got {images.shape} and {texts.shape}")
    if text_image is None:
        if len(images) != len(texts):
            raise ValueError(
                f"expected as many texts as images without text_image, got {len(texts)} texts and "
                f"{len(images)} images; pass text_image, the image of each text"
            )
        text_image = np.arange(len(texts))
    text_image = np.asarray(text_image)
    if text_image.shape != (len(texts),):
        raise ValueError(f"expected text_image of shape ({len(texts)},), one entry per text, got {text_image.shape}")
    _check_values(images, texts, text_image, block_size)

    groups = np.arange(len(images))
    return {
        "image_to_text": _all_ranks(images, groups, texts, text_image, block_size),
        "text_to_image": _all_ranks(texts, text_image, images, groups, block_size),
    }


def retrieval_recall(
    image_features: Float[Array, "..."],
    text_features: Float[Array, "..."],
    text_image: Int[Array, "..."] | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    block_size: int = 1024,
) -> dict[str, float]:
    """Recall at every k, image to text and text to image, with one or several texts per image.

    A query is a hit where a correct candidate is among the k most similar. A wrong candidate that is
    exactly as similar as the correct one is ranked before it, so constant features have recall 0.

    Args:
      image_features, text_features, text_image, block_size: as of `retrieval_ranks`.
      ks: numbers of candidates, each at least 1.

    Returns:
      {"image_to_text/recall@1": …, "text_to_image/recall@1": …, …}, fractions in [0, 1].

    Raises:
      ValueError: as `retrieval_ranks`, or a k below 1.

    Source: Karpathy & Fei-Fei 2015, section 4.1, as reported by CLIP and SigLIP on Flickr30k and COCO.
    """
    if min(ks) < 1:
        raise ValueError(f"expected every k to be at least 1, got {tuple(ks)}")
    ranks = retrieval_ranks(image_features, text_features, text_image, block_size=block_size)
    return {f"{name}/recall@{k}": float(np.mean(rank < k)) for name, rank in ranks.items() for k in ks}


def _check_values(images: np.ndarray, texts: np.ndarray, text_image: np.ndarray, block_size: int) -> None:
    for name, features in (("image", images), ("text", texts)):
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if broken.size:
            raise ValueError(f"expected finite {name} features, got infinity or nan in row {broken[0]}")
    outside = np.flatnonzero((text_image < 0) | (text_image >= len(images)))
    if outside.size:
        raise ValueError(
            f"expected text_image in [0, {len(images)}), got {text_image[outside[0]]} for text {outside[0]}"
        )
    alone = np.setdiff1d(np.arange(len(images)), text_image)
    if alone.size:
        raise ValueError(
            f"expected a text for every image, got none for image {alone[0]} ({alone.size} such); remove it"
        )
    if block_size < 1:
        raise ValueError(f"expected block_size of at least 1, got {block_size}")

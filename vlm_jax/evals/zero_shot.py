"""Zero-shot classification: class names in prompt templates, embedded and averaged."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from vlm_jax.types import Array


def _normalise(features: np.ndarray, names: Sequence[str]) -> np.ndarray:
    norms = np.linalg.norm(features, axis=-1, keepdims=True)
    broken = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if broken.size:
        raise ValueError(
            f"expected features of a finite length above 0, got length {norms[broken[0], 0]} for {names[broken[0]]!r}"
        )
    return features / norms


def class_embeddings(
    encode_text: Callable[[list[str]], Array],
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
) -> Float[np.ndarray, "classes D"]:
    """One embedding per class: the normalised mean of the normalised features of all its prompts.

    Args:
      encode_text: function from a list of `batch_size` prompts to their features [batch_size, D], which
        need not be normalised. Always called with a full list, so that it compiles once; the last
        one is padded with copies of its last prompt.
      class_names: class names, in the order of the labels.
      templates: prompts with one `{}` for the class name, "a photo of a {}.".
      batch_size: prompts per call.

    Returns:
      [classes, D] float32 of norm 1.

    Raises:
      ValueError: no class, no template, a template without exactly one `{}`, a batch size below 1,
        features with another number of rows, of norm 0, or not finite.

    Source: Radford et al. 2021 (CLIP), section 3.1.4.
    """
    if not class_names or not templates or batch_size < 1:
        raise ValueError(
            f"expected at least one class, template and prompt per call, got {len(class_names)} classes, "
            f"{len(templates)} templates and batch_size {batch_size}"
        )
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"expected one {{}} for the class name in every template, got {template!r}")
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    features = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        encoded = np.asarray(encode_text(batch + batch[-1:] * (batch_size - len(batch))), np.float32)
        if encoded.ndim != 2 or len(encoded) != batch_size:
            raise ValueError(f"expected features [{batch_size}, D] of {batch_size} prompts, got shape {encoded.shape}")
        features.append(encoded[: len(batch)])
    normalised = _normalise(np.concatenate(features), prompts)
    means = normalised.reshape(len(class_names), len(templates), -1).mean(axis=1)
    return _normalise(means, class_names)


def class_ranks(
    image_features: Float[Array, "..."],
    classes: Float[Array, "..."],
    labels: Int[Array, "..."],
    *,
    block_size: int = 8192,
) -> Int[np.ndarray, " B"]:
    """Number of wrong classes at least as similar to each image as its own.

    Args:
      image_features: [B, D] float; need not be normalised.
      classes: [classes, D] float, from `class_embeddings`.
      labels: [B] int in [0, classes).
      block_size: images whose similarities to all classes are in memory at a time.

    Raises:
      ValueError: incompatible shapes, no image, features that are not finite, a label outside
        the classes, a block size below 1.
    """
    images, classes = (np.asarray(x, np.float32) for x in (image_features, classes))
    labels = np.asarray(labels)
    if images.ndim != 2 or classes.ndim != 2 or images.shape[1] != classes.shape[1]:
        raise ValueError(f"expected features [B, D] and classes [C, D], got {images.shape} and {classes.shape}")
    if labels.shape != (len(images),) or not len(images):
        raise ValueError(f"expected one label for each of {len(images)} (at least 1) images, got shape {labels.shape}")
    outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if outside.size:
        raise ValueError(f"expected labels in [0, {len(classes)}), got {labels[outside[0]]} for image {outside[0]}")
    if block_size < 1:
        raise ValueError(f"expected block_size of at least 1, got {block_size}")
    for name, features in (("image", images), ("class", classes)):
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if broken.size:
            raise ValueError(f"expected finite {name} features, got infinity or nan in row {broken[0]}")
    ranks = []
    for start in range(0, len(images), block_size):
        block = slice(start, start + block_size)
        similarity = images[block] @ classes.T
        right = np.take_along_axis(similarity, labels[block, None], axis=1)
        ranks.append(np.sum(similarity >= right, axis=1) - 1)  # the correct class is counted too
    return np.concatenate(ranks)


def top_k_accuracy(
    image_features: Float[Array, "..."],
    classes: Float[Array, "..."],
    labels: Int[Array, "..."],
    *,
    k: int = 1,
    block_size: int = 8192,
) -> float:
    """The fraction of images whose class is among the k most similar.

    A wrong class that is exactly as similar as the correct one is ranked before it.

    Args:
      image_features, classes, labels, block_size: as of `class_ranks`.
      k: number of classes, at least 1.

    Raises:
      ValueError: as `class_ranks`, or a k below 1.

    Source: Radford et al. 2021 (CLIP), section 3.1.
    """
    if k < 1:
        raise ValueError(f"expected k and block_size of at least 1, got {k} and {block_size}")
    return float(np.mean(class_ranks(image_features, classes, labels, block_size=block_size) < k))

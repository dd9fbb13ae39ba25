"""The two-tower losses on one device, with one signature; `exchange.py` has them for several devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from vlm_jax.losses.pairwise import DEFAULT_BLOCK_SIZE, Alone, Objective, Scalars, Towers, stream
from vlm_jax.losses.sigmoid import Sigmoid
from vlm_jax.losses.softmax import SoftmaxObjective
from vlm_jax.types import Array, Tree

LOSSES: dict[str, Objective] = {
    "softmax": SoftmaxObjective(),
    "sigmoid": Sigmoid(),
    "distillation": SoftmaxObjective(has_teacher=True),
}


def _scalar(name: str, value: ArrayLike) -> jax.Array:
    value = jnp.asarray(value, jnp.float32)
    if value.size != 1:
        raise ValueError(f"expected one number for `{name}`, got an array of shape {value.shape}")
    return value.reshape(())


def _check_pair(names: str, image: Array, text: Array) -> None:
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"expected {names} features of one shape [batch, width], got {tuple(image.shape)} and "
            f"{tuple(text.shape)}; row i of both must be a pair, projected to one width"
        )


def pack(
    objective: Objective,
    image_features: Array,
    text_features: Array,
    *,
    scale: ArrayLike,
    bias: ArrayLike,
    teacher_image_features: Array | None = None,
    teacher_text_features: Array | None = None,
    teacher_scale: ArrayLike | None = None,
) -> tuple[Towers, Scalars]:
    """Checks and collects the arguments of a loss; a teacher's get no gradient."""
    _check_pair("image and text", image_features, text_features)
    scalars = Scalars(_scalar("scale", scale), _scalar("bias", bias))
    image, text = teacher_image_features, teacher_text_features
    given = sum(x is not None for x in (image, text, teacher_scale))
    if given != 3 * objective.has_teacher:
        expected = "all of" if objective.has_teacher else "none of"
        raise ValueError(
            f"expected {expected} teacher_image_features, teacher_text_features and teacher_scale, "
            f"got {given} of the three; only the distillation loss has a teacher"
        )
    if image is None or text is None or teacher_scale is None:
        return Towers(image_features, text_features), scalars
    _check_pair("teacher image and text", image, text)
    if image.shape[0] != image_features.shape[0]:
        raise ValueError(
            f"expected teacher features of the same {image_features.shape[0]} examples as the student's, "
            f"got {image.shape[0]} rows"
        )
    teacher = jax.lax.stop_gradient((image, text, _scalar("teacher_scale", teacher_scale)))
    return Towers(image_features, text_features, *teacher[:2]), scalars._replace(teacher_scale=teacher[2])


def check_block_size(block_size: int) -> None:
    """Raises ValueError unless a tile has at least one row."""
    if block_size < 1:
        raise ValueError(f"expected block_size of at least 1 image per tile, got {block_size}")


def _single(name: str, block_size: int, *features: Array, **arguments: Any) -> tuple[jax.Array, ...]:
    check_block_size(block_size)
    towers, scalars = pack(LOSSES[name], *features, **arguments)
    block_size = min(block_size, max(towers.image.shape[0], 1))
    return stream(LOSSES[name], Alone(), block_size)(towers, scalars)


def softmax_loss(
    image_features: Float[Array, "..."],
    text_features: Float[Array, "..."],
    *,
    scale: ArrayLike,
    bias: ArrayLike = 0.0,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Float[Array, ""]:
    """CLIP's loss: softmax cross-entropy of each image over all texts and of each text over all images.

    Args:
      image_features: [B, D] float, normalised by the caller; row i is the pair of row i of the texts.
      text_features: [B, D] float, normalised by the caller.
      scale: positive number (or one-element array) that multiplies the cosine similarities: the
        exponential of a stored log temperature, not the log itself.
      bias: number added to every logit. It does not change a softmax; all losses take one.
      block_size: images whose logits with all texts are in memory at a time.

    Returns:
      float32 scalar, the mean of both directions' mean cross-entropies.

    Raises:
      ValueError: features of different or not two-dimensional shapes, a scale or bias of several
        numbers, a block size below 1.

    Source: Radford et al. 2021 (CLIP), figure 3; open_clip's `ClipLoss`. Here the logits exist tile
    by tile; features are cast to float32 first.
    """
    return _single("softmax", block_size, image_features, text_features, scale=scale, bias=bias)[0]


def sigmoid_loss(
    image_features: Float[Array, "..."],
    text_features: Float[Array, "..."],
    *,
    scale: ArrayLike,
    bias: ArrayLike = 0.0,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Float[Array, ""]:
    """SigLIP's loss: every pair of an image and a text is classified as matching or not.

    Arguments and errors are those of `softmax_loss`; SigLIP starts with `scale` 10 and `bias` -10.

    Returns:
      float32 scalar, the sum over all B * B pairs divided by B.

    Source: Zhai et al. 2023 (SigLIP), algorithm 1; big_vision's siglip trainer.
    """
    return _single("sigmoid", block_size, image_features, text_features, scale=scale, bias=bias)[0]


def distillation_loss(
    image_features: Float[Array, "..."],
    text_features: Float[Array, "..."],
    *,
    scale: ArrayLike,
    bias: ArrayLike = 0.0,
    teacher_image_features: Float[Array, "..."],
    teacher_text_features: Float[Array, "..."],
    teacher_scale: ArrayLike,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """CLIP's loss, and the cross-entropy between a teacher's softmaxes and the student's.

    Arguments and errors are those of `softmax_loss`, and:

    Args:
      teacher_image_features: [B, E] float, normalised by the caller, of the same examples; the
        width may differ from the student's. No gradient flows into the teacher.
      teacher_text_features: [B, E] float.
      teacher_scale: number that multiplies the teacher's cosine similarities.

    Returns:
      (contrastive, distillation), float32 scalars, each the mean of both directions; the caller
      weighs and adds them.

    Raises:
      ValueError: as `softmax_loss`, and teacher features that do not fit the student's.

    Source: open_clip's `DistillClipLoss`.
    """
    contrastive, distilled = _single(
        "distillation",
        block_size,
        image_features,
        text_features,
        scale=scale,
        bias=bias,
        teacher_image_features=teacher_image_features,
        teacher_text_features=teacher_text_features,
        teacher_scale=teacher_scale,
    )
    return contrastive, distilled


def locked_image(loss: Callable[..., Tree]) -> Callable[..., Tree]:
    """The same loss without gradients for image features: locked-image tuning.

    Args:
      loss: any loss of this package, on one device or `distributed`, whose first argument is
        the image features.

    Source: Zhai et al. 2022 (LiT), section 3; with `sigmoid_loss` it is SigLiT of Zhai et al. 2023.
    """

    def locked(image_features: Array, *args: Any, **kwargs: Any) -> Tree:
        return loss(jax.lax.stop_gradient(image_features), *args, **kwargs)

    return locked

"""HoloV: every part of the image gets a share of the budget, by the attention to it and the variety inside it."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.layers.local_rows import row_by_row
from vlm_jax.ranges import NonNegative, Share, Size
from vlm_jax.reducers.reducer import KeepsAttended, Rule, every, highest, pick, real
from vlm_jax.types import VisualFeatures

_SMALL = 1e-6  # of the release
_SCALE = 1e3  # of attention


class Crops(NamedTuple):
    """The crops of an image.

    Attributes:
      number: of each feature, the number of its crop; the number of crops for a masked feature. There are no more
        crops than features.
      sizes: real features of each crop.
      shares: features that each crop keeps, which may be more than it has.
    """

    number: Int[Array, "B N"]
    sizes: Int[Array, "B P"]
    shares: Int[Array, "B P"]


class HoloV(KeepsAttended):
    """Splits the sequence of features into crops; each keeps its share of the budget, the most attended features.

    A feature's score is its attention, plus `variety` times the variance of its cosines to the others of the crop,
    scaled to the mean attention of the crop. A crop's share is in proportion to its mean score, rounded down; the crops
    with the largest shares keep one more, up to the budget. Features stay in order.

    By the rule `as_released` the features that are cut from a crop stand by falling attention, a crop that keeps all of
    its features stays as it is, and where crops have fewer features than their shares, rows of zeros follow, at the
    position of the last feature.

    Attributes:
      num_crops: crops of an image, runs of the flattened sequence that differ by at most one in length.
      variety: weight of the variance (alpha in the code for LLaVA, beta in that for Qwen2.5-VL).
      ratio: by `as_released`, the share of an image's features that is kept, rounded down, as configured in the release
        for Qwen2.5-VL; None for `num_kept`.

    Source: Zou et al. 2025 (HoloV), section 3; llava/model/utils.py, HoloV, called with 16 crops. As there, the
    variance includes the feature itself as 0 and is divided by one less than the crop's length; since it is scaled to
    the attention, it hardly changes a crop's share. The attention is of the encoder's last built block, the mean over
    heads; the release takes features after the projector (`VLM.reduce` is `tokens`). Deviations: each tile has crops
    of its own, where the release joins the tiles of a picture. Only in `exact`: what crops cannot use of their
    shares goes to the most attended of the other features, and a crop of one feature is scored as the others are.
    """

    kind: ClassVar[str] = "holov"
    on_tokens: ClassVar[tuple[Rule, ...]] = ("as_released",)

    num_crops: Size = 16
    variety: NonNegative = 0.09
    ratio: Share | None = None

    def num_left(self, count: int) -> int:
        """`num_kept`, or all where there are fewer; with `ratio`, its share of `count`."""
        if self.rule == "as_released":
            return self.num_kept if self.ratio is None else int(self.ratio * count)
        return min(self.num_kept, count)

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        del deterministic
        if self.rule == "exact" and self.passes(features):
            return every(features)
        saliency, mask = jnp.nan_to_num(self.attended(features)[0]), features.mask
        crops = self.crops(features)
        sizes, shares = (_of_feature(x, crops.number) for x in (crops.sizes, crops.shares))
        rank = _rank(saliency, crops.number)
        chosen = mask & (rank < shares)
        if self.rule == "exact":
            return self.take(features, highest(jnp.where(chosen, jnp.inf, saliency), mask, self.num_kept))
        batch, size = mask.shape
        place, count = jnp.arange(size)[None], self.num_left(size)
        inside = jnp.where(shares < sizes, rank, place)  # below `size`
        order = jnp.argsort(jnp.where(chosen, crops.number * size + inside, (size + 1) * size), axis=1)
        kept = jnp.pad(order, ((0, 0), (0, max(0, count - size))))[:, :count]
        there = jnp.arange(count)[None] < chosen.sum(axis=1, keepdims=True)
        kept = jnp.where(there, kept, size - 1)
        shown = jnp.broadcast_to(mask.any(axis=1, keepdims=True), (batch, count))
        return self.left(features, real(pick(features.tokens, kept), there), kept, shown)

    def crops(self, features: VisualFeatures) -> Crops:
        """The crops of the real features, with their shares."""
        mask, total = features.mask, self.num_left(features.mask.shape[1])
        num_crops = min(self.num_crops, mask.shape[1])
        number = crop_numbers(mask, num_crops)
        sizes = jax.nn.one_hot(number, num_crops, dtype=jnp.int32).sum(axis=1)
        scores = self._scores(features, number, sizes)
        weights = scores / (scores.sum(axis=1, keepdims=True) + _SMALL)
        shares = jnp.floor(weights * total).astype(jnp.int32)
        missing = total - shares.sum(axis=1, keepdims=True)
        by_weight = jnp.argsort(jnp.where(sizes > 0, -weights, jnp.inf), axis=1)
        return Crops(number, sizes, shares + (jnp.argsort(by_weight, axis=1) < missing) * (sizes > 0))

    def _scores(
        self, features: VisualFeatures, number: Int[Array, "B N"], sizes: Int[Array, "B P"]
    ) -> Float[Array, "B P"]:
        """The mean score of every crop."""
        saliency = real(jnp.nan_to_num(self.attended(features)[0]), features.mask)
        variance = _variance(features, number, _of_feature(sizes, number))
        members = jax.nn.one_hot(number, sizes.shape[1])
        attention, spread = (
            jnp.einsum("bn,bnp->bp", x, members, precision="highest") / jnp.maximum(sizes, 1)
            for x in (saliency, variance)
        )
        scores = _SCALE * attention * (1 + self.variety * spread / (spread + _SMALL))
        return jnp.where(sizes == 1, attention, scores) if self.rule == "as_released" else scores


def crop_numbers(mask: Bool[Array, "B N"], num_crops: int) -> Int[Array, "B N"]:
    """The number of the crop of every real feature; `num_crops` for masked features.

    The first crops have one feature more where the number of features does not divide.
    """
    place, count = jnp.cumsum(mask, axis=1) - 1, mask.sum(axis=1, keepdims=True)
    short, longer = count // num_crops, count % num_crops
    start = longer * (short + 1)  # of the shorter crops
    after = longer + (place - start) // jnp.maximum(short, 1)
    return jnp.where(mask, jnp.where(place < start, place // (short + 1), after), num_crops)


def _variance(features: VisualFeatures, number: Int[Array, "B N"], sizes: Int[Array, "B N"]) -> Float[Array, "B N"]:
    """The variance of every feature's cosines to those of its crop, its own counted as 0."""
    tokens = real(jax.lax.stop_gradient(features.tokens), features.mask).astype(jnp.float32)
    units = tokens / (jnp.linalg.norm(tokens, axis=-1, keepdims=True) + _SMALL)
    same = (number[:, :, None] == number[:, None]) & features.mask[:, None]
    others = same & ~jnp.eye(number.shape[1], dtype=bool)[None]
    cosines = jnp.where(others, jnp.einsum("bnd,bmd->bnm", units, units), 0)
    degrees = jnp.maximum(sizes - 1, 1)
    mean = cosines.sum(axis=-1) / degrees
    return jnp.where(same, (cosines - mean[..., None]) ** 2, 0).sum(axis=-1) / degrees


@row_by_row
def _of_feature(x: Int[Array, "B P"], number: Int[Array, "B N"]) -> Int[Array, "B N"]:
    """A number of each crop, for each of its features; 0 for masked features."""
    return jnp.take_along_axis(jnp.pad(x, ((0, 0), (0, 1))), number, axis=1)


def _rank(saliency: Float[Array, "B N"], number: Int[Array, "B N"]) -> Int[Array, "B N"]:
    """How many features of the same crop get more attention, or as much and come first."""
    place = jnp.arange(number.shape[1])
    higher = saliency[:, None] > saliency[..., None]
    higher |= (saliency[:, None] == saliency[..., None]) & (place[None] < place[:, None])[None]
    return (higher & (number[:, :, None] == number[:, None])).sum(axis=-1)

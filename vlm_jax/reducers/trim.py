"""TRIM: keeps features by their similarity to the question, and the mean of the others."""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.ranges import Share
from vlm_jax.reducers.cdpruner import mean_cosine
from vlm_jax.reducers.reducer import GuidedByClip, best, every, marked, pick, real
from vlm_jax.types import VisualFeatures


class TRIM(GuidedByClip):
    """Keeps the features whose CLIP embeddings are least like the question's, and one mean of all others.

    Least like, because the release negates the similarity before it ranks.

    Attributes:
      ratio: by the rule `as_released`, the share of an image's features that is kept besides the mean, rounded down, as
        configured in the release (`TextSim+:0.2`); None for `num_kept`, which includes the mean.

    Source: Song et al. 2024 (TRIM), section 3; multimodal_encoder/clip_encoder.py, token_reduction, of the release.
    There is no golden of it. Deviations: the number is that of the budget or of `ratio`, not of the outliers of one
    image; a question longer than the text tower is cut into segments, whose similarities are averaged, where the
    release truncates it; by `exact` similarity is the cosine, as in the paper, and the mean is in the place of the best
    of those that it is of. By `as_released` it is the product of both embeddings, and the mean is last.
    """

    kind: ClassVar[str] = "trim"

    ratio: Share | None = None

    def num_left(self, count: int) -> int:
        """`num_kept`, or all where there are fewer; with `ratio`, its share of `count`, and the mean."""
        if self.rule == "as_released" and self.ratio is not None:
            return min(int(count * self.ratio) + 1, count)
        return min(self.num_kept, count)

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        del deterministic
        if self.rule == "exact" and self.passes(features):
            return every(features)
        mask, size = features.mask, features.mask.shape[1]
        left = self.num_left(size)
        order = best(jnp.where(mask, jnp.nan_to_num(-self.similarity(features)), -jnp.inf), count=min(left, size))
        chosen = marked(order[:, : left - 1], size=size)
        rest = mask & ~chosen
        count = jnp.maximum(rest.sum(axis=1), 1)[:, None]
        mean = real(features.tokens, rest).sum(axis=1) / count.astype(features.tokens.dtype)
        mean = jnp.where(rest.any(axis=1)[:, None], mean, 0)
        kept = jnp.sort(order[:, : left - 1], axis=1)
        kept = jnp.concatenate([kept, order[:, -1:]], axis=1)
        tokens = pick(features.tokens, kept).at[:, -1].set(mean)
        shown = pick(mask, kept).at[:, -1].set(rest.any(axis=1))
        if self.rule == "as_released":
            return self.left(features, tokens, kept, shown)
        placed = jnp.argsort(jnp.where(shown, kept, size), axis=1)
        return self.left(features, *(pick(x, placed) for x in (tokens, kept, shown)))

    def similarity(self, features: VisualFeatures) -> Float[Array, "B N"]:
        """Of every feature the mean similarity to the segments of the question."""
        given = self.guidance(features)
        if self.rule == "exact":
            return mean_cosine(given)
        weights = given.mask / jnp.maximum(given.mask.sum(axis=1, keepdims=True), 1)
        return jnp.einsum("bne,bse,bs->bn", given.image, given.text, weights, precision="highest")

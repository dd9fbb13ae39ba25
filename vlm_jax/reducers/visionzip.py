"""VisionZip: keeps features with high attention and merges the others into a few."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.ranges import Share
from vlm_jax.reducers.reducer import KeepsAttended, Part, best, every, highest, marked, pick, real, unit
from vlm_jax.types import Fields, VisualFeatures


class Contextual(NamedTuple):
    """Merged features.

    Attributes:
      tokens: each is a target plus the mean of the features assigned to it.
      targets: indices of the targets.
      joins: 1 where a feature is assigned to a target.
    """

    tokens: Float[Array, "B C D"]
    targets: Int[Array, "B C"]
    joins: Float[Array, "B N C"]


class VisionZip(KeepsAttended):
    """Dominant features unchanged, and contextual features merged from the rest.

    Targets are sampled from the rest at even steps; each other feature is assigned to the target whose key, averaged
    over heads, is nearest by cosine: a contextual feature is a target plus the mean of those assigned to it. Features
    stay in the order of their positions.

    By the rule `as_released` the class token is the first feature, is always kept and counts as dominant, and the
    contextual features come after the dominant ones. The attention is of the last built block: use select_layer -2,
    as in the release.

    Attributes:
      contextual_share: share of the budget that is contextual; rounded, and at least one feature is dominant.

    Source: Yang et al. 2024 (VisionZip), sections 3.2 and 3.3; visionzip/clip_encoder.py, where
    10 of 64 are contextual. Deviation of `exact`: the class token is not among the features.
    """

    kind: ClassVar[str] = "visionzip"

    contextual_share: Share = 10 / 64

    @property
    def num_contextual(self) -> int:
        """Number of contextual features."""
        return max(0, min(round(self.num_kept * self.contextual_share), self.num_kept - 1))

    def num_left(self, count: int) -> int:
        """`num_kept`, or all where there are fewer; by `as_released` including the class token."""
        return min(self.num_kept, count + int(self.rule == "as_released"))

    def required_fields(self) -> dict[Part, Fields]:
        """The attention of the last block, per head; by `as_released` also the class token."""
        return {"encoder": {"saliency": "heads"} | ({} if self.rule == "exact" else {"keep_class_token": True})}

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        del deterministic
        if self.rule == "exact" and self.passes(features):
            return every(features)
        saliency, keys = self.attended(features)
        released = self.rule == "as_released"
        if released and features.num_prefix != 1:
            raise ValueError(f"{self.kind}: the rule 'as_released' needs a class token: set {self.required_fields()}")
        if released:  # the class token has the highest priority
            saliency = saliency.at[:, 0].set(jnp.inf)
        mask, count = features.mask, self.num_contextual
        size = min(self.num_kept, mask.shape[1])
        dominant = jnp.sort(best(saliency, count=size - count)) if released else highest(saliency, mask, size - count)
        if not count:
            return self.take(features, dominant)
        merged = contextual(real(features.tokens, mask), mask, keys, dominant, count)
        found = jnp.concatenate([pick(features.tokens, dominant), merged.tokens], axis=1)
        places = jnp.concatenate([dominant, merged.targets], axis=1)
        if not released:
            in_order = jnp.argsort(places, axis=1)
            found, places = pick(found, in_order), pick(places, in_order)
        return self.left(features, found, places)


def contextual(
    tokens: Float[Array, "B N D"],
    mask: Bool[Array, "B N"],
    keys: Float[Array, "B N K H"],
    dominant: Int[Array, "B M"],
    count: int,
) -> Contextual:
    """`count` contextual features, merged from the features that are not dominant."""
    rest = ~marked(dominant, size=mask.shape[1])
    order = jnp.argsort(jnp.where(rest, jnp.where(mask, 0, 1), 2), axis=1)  # the unmasked rest, padding, dominant ones
    step = jnp.maximum((rest & mask).sum(axis=1, keepdims=True) // count, 1)
    targets = pick(order, jnp.arange(count)[None] * step)
    merged = rest & mask & ~marked(targets, size=mask.shape[1])
    keys = unit(real(keys, mask).astype(jnp.float32).mean(axis=2))
    similarity = jnp.einsum("bnh,bch->bnc", keys, pick(keys, targets))
    joins = jax.nn.one_hot(jnp.argmax(similarity, axis=-1), count) * merged[..., None]
    total = jnp.einsum("bnc,bnd->bcd", joins, tokens.astype(jnp.float32))
    mean = total / jnp.maximum(joins.sum(axis=1), 1)[..., None]
    return Contextual(pick(tokens, targets) + mean.astype(tokens.dtype), targets, joins)

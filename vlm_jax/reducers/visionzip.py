"""VisionZip: features that get much attention are kept, the others are merged into a few."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.reducers.reducer import KeepsFeatures, Part, every, highest, marked, pick, real, unit
from vlm_jax.types import VisualFeatures


class Contextual(NamedTuple):
    """Features that stand for others.

    Attributes:
      tokens: each is a target plus the mean of what joined it.
      targets: their indices.
      joins: 1 where a feature joins a target.
    """

    tokens: Float[Array, "B C D"]
    targets: Int[Array, "B C"]
    joins: Float[Array, "B N C"]


class VisionZip(KeepsFeatures):
    """Dominant features as they are, and contextual ones that stand for the rest.

    The rest are taken at even steps, as targets; each of the others is added to the target whose key, averaged
    over heads, is nearest by cosine: a target plus the mean of what came to it. Features stay in the order of
    their places.

    By the rule `as_released` the class token is the first feature, always stays and is one of the dominant, and the
    contextual features stand behind these. The attention is that of the last block that is built: select layer -2,
    as the release does.

    Attributes:
      contextual_share: share of the budget that is contextual; rounded, and at least one feature is dominant.

    Source: Yang et al. 2024 (VisionZip), sections 3.2 and 3.3; visionzip/clip_encoder.py, whose settings have
    10 of 64 contextual. Deviation of `exact`: the class token is no feature, and so not among the dominant.
    """

    kind: ClassVar[str] = "visionzip"

    contextual_share: float = 10 / 64

    @property
    def num_contextual(self) -> int:
        """Features that stand for others."""
        return max(0, min(round(self.num_kept * self.contextual_share), self.num_kept - 1))

    def num_left(self, count: int) -> int:
        """`num_kept`, or all where there are fewer; of the release the class token is one of them."""
        return min(self.num_kept, count + int(self.rule == "as_released"))

    def required_fields(self) -> dict[Part, dict[str, Any]]:
        """The attention of the last block, head by head; of the release the class token too."""
        return {"encoder": {"saliency": "heads"} | ({} if self.rule == "exact" else {"keep_class_token": True})}

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        del deterministic
        if self.rule == "exact" and self.passes(features):
            return every(features)
        saliency, keys = self.attended(features)
        released = self.rule == "as_released"
        if released and features.num_prefix != 1:
            raise ValueError(f"{self.kind}: the released rule wants a class token: set {self.required_fields()}")
        if released:  # the class token is kept before any other
            saliency = saliency.at[:, 0].set(jnp.inf)
        mask, count = features.mask, self.num_contextual
        size = min(self.num_kept, mask.shape[1])
        dominant = (
            jnp.sort(jax.lax.top_k(saliency, size - count)[1]) if released else highest(saliency, mask, size - count)
        )
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
    """What `count` of the features that are not dominant become when the others join them."""
    rest = ~marked(dominant, mask.shape[1])
    order = jnp.argsort(jnp.where(rest, jnp.where(mask, 0, 1), 2), axis=1)  # the real rest, padding, dominant ones
    step = jnp.maximum((rest & mask).sum(axis=1, keepdims=True) // count, 1)
    targets = pick(order, jnp.arange(count)[None] * step)
    merged = rest & mask & ~marked(targets, mask.shape[1])
    keys = unit(real(keys, mask).astype(jnp.float32).mean(axis=2))
    similarity = jnp.einsum("bnh,bch->bnc", keys, pick(keys, targets))
    joins = jax.nn.one_hot(jnp.argmax(similarity, axis=-1), count) * merged[..., None]
    total = jnp.einsum("bnc,bnd->bcd", joins, tokens.astype(jnp.float32))
    mean = total / jnp.maximum(joins.sum(axis=1), 1)[..., None]
    return Contextual(pick(tokens, targets) + mean.astype(tokens.dtype), targets, joins)

"""VisionZip: features that get much attention are kept, the others are merged into a few."""

from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.reducers.reducer import KeepsFeatures, highest, marked, pick, real, unit
from vlm_jax.types import VisualFeatures


class VisionZip(KeepsFeatures):
    """Dominant features as they are, and contextual ones that stand for the rest.

    The rest are taken at even steps, as targets; each of the others is added to the target whose key, averaged
    over heads, is nearest by cosine: a target plus the mean of what came to it. Features stay in the order of
    their places.

    Attributes:
      contextual_share: share of the budget that is contextual; rounded, and at least one feature is dominant.

    Source: Yang et al. 2024 (VisionZip), sections 3.2 and 3.3; visionzip/clip_encoder.py, whose settings have
    10 of 64 contextual. Deviations: the class token is no feature here, and so not among the dominant; the
    release puts contextual features last.
    """

    kind = "visionzip"

    contextual_share: float = 10 / 64

    @property
    def num_contextual(self) -> int:
        """Features that stand for others."""
        return max(0, min(round(self.num_kept * self.contextual_share), self.num_kept - 1))

    def required_fields(self) -> dict[str, dict[str, Any]]:
        """The attention of the last block, head by head."""
        return {"encoder": {"saliency": "heads"}}

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        del deterministic
        saliency, keys = self.attended(features)
        mask, tokens, count = features.mask, real(features.tokens, features.mask), self.num_contextual
        dominant = highest(saliency, mask, self.num_kept - count)
        if not count:
            return self.take(features, dominant)
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
        contextual = pick(tokens, targets) + mean.astype(tokens.dtype)
        places = jnp.concatenate([dominant, targets], axis=1)
        in_order = jnp.argsort(places, axis=1)
        found = jnp.concatenate([pick(features.tokens, dominant), contextual], axis=1)
        grid = self.reduced_grid(features.grid)
        return features.reduced(pick(found, in_order), pick(mask, pick(places, in_order)), grid)

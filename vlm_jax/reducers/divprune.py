"""DivPrune: the features that are least alike."""

import jax
import jax.numpy as jnp

from vlm_jax.reducers.reducer import KeepsFeatures, real, unit
from vlm_jax.types import VisualFeatures

# Below any cosine distance: what is masked, and what is taken already.
_MASKED, _TAKEN = -1.0, -2.0


class DivPrune(KeepsFeatures):
    """Keeps features so that the least cosine distance between two of them is large.

    Greedy: first the feature whose nearest neighbour is farthest, then, again and again, the one whose
    nearest among those taken is. Kept in their order.

    Source: Alvar et al. 2025 (DivPrune), section 3.3 and algorithm 1. Deviation: the release measures
    distances of tokens behind the connector, this of features before it, so that any connector may follow.
    """

    kind = "divprune"

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        del deterministic
        mask = features.mask
        units = unit(real(jax.lax.stop_gradient(features.tokens), mask))
        distances = 1 - jnp.einsum("bnd,bmd->bnm", units, units)
        alone = jnp.eye(mask.shape[1], dtype=bool)[None] | ~mask[:, None]
        nearest = jnp.min(jnp.where(alone, jnp.inf, distances), axis=-1)
        row = jnp.arange(mask.shape[0])

        def take(_, carry):
            scores, least, taken = carry
            chosen = jnp.argmax(jnp.where(taken, _TAKEN, jnp.where(mask, scores, _MASKED)), axis=1)
            least = jnp.minimum(least, distances[row, chosen])
            return least, least, taken.at[row, chosen].set(True)

        start = (nearest, jnp.full_like(nearest, jnp.inf), jnp.zeros_like(mask))
        taken = jax.lax.fori_loop(0, self.num_kept, take, start)[2]
        return self.take(features, jnp.argsort(~taken, axis=1)[:, : self.num_kept])

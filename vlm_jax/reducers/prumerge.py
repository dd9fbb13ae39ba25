"""LLaVA-PruMerge: features that the class token looks at, each with its neighbours added to it."""

from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.reducers.reducer import KeepsFeatures, highest, marked, pick, real, spread, unit
from vlm_jax.types import VisualFeatures


class PruMerge(KeepsFeatures):
    """Keeps the most salient features; what is nearest to each is added to it, weighted by its saliency.

    Near are the features whose keys, all heads as one vector, have the largest cosine.

    Attributes:
      num_neighbors: how many are added to each feature; all others where there are fewer.
      spatial_share: share of the budget, rounded, that is taken at even steps from what is not salient, as
        the variant PruMerge+ does; 0 for PruMerge.

    Source: Shang et al. 2024 (LLaVA-PruMerge), section 3 and algorithm 1; multimodal_encoder/clip_encoder.py.
    Deviations: the budget says how many are kept, where the paper counts outliers of the attention; the spatial
    samples are taken from the rest, so that their number is fixed; no token for all that was left out is
    appended; attention and keys are those of the last block that is built, and of all patches where there is
    no class token.
    """

    kind = "prumerge"

    num_neighbors: int = 32
    spatial_share: float = 0.0

    def required_fields(self) -> dict[str, dict[str, Any]]:
        """The attention of the last block, all heads as one."""
        return {"encoder": {"saliency": "joined"}}

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        del deterministic
        saliency, keys = self.attended(features)
        mask, tokens = features.mask, real(features.tokens, features.mask)
        size = mask.shape[1]
        weights = real(saliency, mask)
        num_spatial = round(self.num_kept * min(max(self.spatial_share, 0.0), 1.0))
        kept = highest(weights, mask, self.num_kept - num_spatial)
        if num_spatial:
            even = spread(mask & ~marked(kept, size), num_spatial)
            kept = jnp.sort(jnp.concatenate([kept, even], axis=1), axis=1)
        keys = unit(real(keys.reshape(*mask.shape, -1), mask))
        similarity = jnp.einsum("bkh,bnh->bkn", pick(keys, kept), keys)
        itself = kept[..., None] == jnp.arange(size)[None, None]
        similarity = jnp.where(itself | ~mask[:, None], -jnp.inf, similarity)
        near = jax.lax.top_k(similarity, min(self.num_neighbors, size - 1))[1]
        row = jnp.arange(mask.shape[0])[:, None, None]
        place = jnp.arange(self.num_kept)[None, :, None]
        shares = jnp.zeros(similarity.shape).at[row, place, near].set(weights[row, near])
        added = jnp.einsum("bkn,bnd->bkd", jnp.where(itself, 0, shares), tokens.astype(jnp.float32))
        merged = pick(tokens, kept) + added.astype(tokens.dtype)
        return features.reduced(merged, pick(mask, kept), self.reduced_grid(features.grid))

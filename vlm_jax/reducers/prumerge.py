"""LLaVA-PruMerge: features that the class token attends to most, each with its neighbours added to it."""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.layers.local_rows import row_by_row
from vlm_jax.ranges import Share, Size
from vlm_jax.reducers.reducer import KeepsAttended, Part, best, every, highest, marked, pick, real, spread, unit
from vlm_jax.types import Fields, VisualFeatures


class PruMerge(KeepsAttended):
    """Keeps the most salient features; to each its nearest features are added, weighted by their saliency.

    The nearest features are those with the largest cosine of keys, all heads concatenated.

    By the rule `as_released` features are in descending saliency, followed by the spatial ones of PruMerge+ and a last
    token, the weighted sum of all dropped features.

    Attributes:
      num_neighbors: how many are added to each feature; all others where there are fewer.
      spatial_share: share of the budget, rounded, that is sampled at even steps from the features that are not salient,
        as in PruMerge+; 0 for PruMerge. By `as_released` any share above 0 is PruMerge+.
      ratio: by `as_released`, the share of an image's features that is salient, rounded down, as the release configures
        or computes; None for `num_kept` minus the last token.
      adaptive: by `as_released`, PruMerge+ takes three times as many spatial features, without duplicates:
        duplicates are masked.

    Source: Shang et al. 2024 (LLaVA-PruMerge), section 3 and algorithm 1; multimodal_encoder/clip_encoder.py.
    Deviations: the budget or `ratio` sets the number of kept features, where the paper counts attention outliers;
    attention and keys are of the last built block (in the release, of the block after its features),
    and averaged over all patches where there is no class token. Only in `exact`: the spatial samples are taken from the
    remaining features, so that their number is fixed; no token for the dropped features is appended.
    """

    kind: ClassVar[str] = "prumerge"

    num_neighbors: Size = 32
    spatial_share: Share = 0.0
    ratio: Share | None = None
    adaptive: bool = False

    def required_fields(self) -> dict[Part, Fields]:
        """The attention of the last block, all heads joined."""
        return {"encoder": {"saliency": "joined"}}

    def num_left(self, count: int) -> int:
        """`num_kept`, or all where there are fewer; by `as_released` salient, spatial and last token."""
        if self.rule == "exact":
            return min(self.num_kept, count)
        return self.num_salient(count) + len(self.spatial(count)) + 1

    def num_salient(self, count: int) -> int:
        """By `as_released`, the number of salient features of an image that has `count`."""
        return min(self.num_kept - 1, count) if self.ratio is None else int(count * self.ratio)

    def spatial(self, count: int) -> range:
        """Indices that PruMerge+ takes at even steps from an image with `count` features; never the last."""
        if self.spatial_share <= 0:
            return range(0)
        step = int(1 / (self.num_salient(count) / count if self.ratio is None else self.ratio))
        if self.adaptive:
            return range(0, count - 1, max(step // 3, 1))
        return range(step // 2, count - 1, max(step, 1))

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        del deterministic
        if self.rule == "exact" and self.passes(features):
            return every(features)
        saliency, keys = self.attended(features)
        tokens, weights = real(features.tokens, features.mask), real(saliency, features.mask)
        if self.rule == "as_released":
            return self._released(features, tokens, weights, keys)
        kept = self._kept(weights, features.mask)
        every_one = jnp.broadcast_to(jnp.arange(weights.shape[1])[None], weights.shape)
        usable = (kept[..., None] != every_one[:, None]) & features.mask[:, None]
        added = self._added(tokens, weights, real(keys, features.mask), kept, every_one, usable)
        some_go = features.mask.sum(axis=1) > self.num_kept  # an image with no more features is unchanged
        return self.left(features, pick(tokens, kept) + jnp.where(some_go[:, None, None], added, 0), kept)

    def _kept(self, weights: Float[Array, "B N"], mask: Bool[Array, "B N"]) -> Int[Array, "B K"]:
        num_spatial = round(self.num_kept * min(max(self.spatial_share, 0.0), 1.0))
        kept = highest(weights, mask, self.num_kept - num_spatial)
        if not num_spatial:
            return kept
        even = spread(mask & ~marked(kept, size=mask.shape[1]), num_spatial)
        return jnp.sort(jnp.concatenate([kept, even], axis=1), axis=1)

    def _added(
        self,
        tokens: Float[Array, "B N D"],
        weights: Float[Array, "B N"],
        keys: Float[Array, "B N K H"],
        kept: Int[Array, "B M"],
        others: Int[Array, "B C"],
        usable: Bool[Array, "B M C"],
    ) -> Float[Array, "B M D"]:
        """The weighted sum of the neighbours of each kept feature, among its `usable` ones of the `others`."""
        keys = unit(keys.reshape(*weights.shape, -1))
        similarity = jnp.einsum("bkh,bnh->bkn", pick(keys, kept), pick(keys, others))
        similarity = jnp.where(usable, similarity, -jnp.inf)
        near = best(similarity, count=min(self.num_neighbors, others.shape[1] - 1))
        shares = jnp.where(usable, shares_of(pick(weights, others), near), 0)
        return jnp.einsum("bkn,bnd->bkd", shares, pick(tokens, others).astype(jnp.float32)).astype(tokens.dtype)

    def _released(
        self,
        features: VisualFeatures,
        tokens: Float[Array, "B N D"],
        weights: Float[Array, "B N"],
        keys: Float[Array, "B N K H"],
    ) -> VisualFeatures:
        """Salient features in descending saliency, spatial ones, and the sum of the others as the last token."""
        mask = features.mask
        batch, size = mask.shape
        ranked = jnp.where(mask, jnp.nan_to_num(weights), -jnp.inf)
        kept = best(ranked, count=self.num_salient(size))
        again = jnp.zeros(kept.shape, bool)
        if steps := self.spatial(size):
            even = jnp.broadcast_to(jnp.asarray(steps, jnp.int32)[None], (batch, len(steps)))
            again = jnp.concatenate([again, pick(marked(kept, size=size), even)], axis=1)
            kept = jnp.concatenate([kept, even], axis=1)
        rest_of = left_out(kept, jnp.where(self.adaptive, 0, again.sum(axis=1)), size) & mask
        # Neighbours are searched among all kept features, duplicates included, and the last token's.
        others = jnp.concatenate([kept, jnp.broadcast_to(jnp.arange(size)[None], mask.shape)], axis=1)
        usable = jnp.concatenate([pick(mask, kept) & ~(again & self.adaptive), rest_of], axis=1)
        usable = usable[:, None] & (jnp.arange(kept.shape[1])[:, None] != jnp.arange(others.shape[1])[None])[None]
        added = self._added(tokens, weights, real(keys, mask), kept, others, usable)
        merged = pick(tokens, kept) + added
        others = jnp.where(rest_of, weights, 0)
        rest = jnp.einsum("bn,bnd->bd", others, tokens.astype(jnp.float32)).astype(tokens.dtype)
        found = jnp.concatenate([merged, rest[:, None]], axis=1)
        last = jnp.full((batch, 1), size - 1, kept.dtype)
        shown = jnp.concatenate([pick(mask, kept) & ~(again & self.adaptive), mask.any(axis=1, keepdims=True)], axis=1)
        return self.left(features, found, jnp.concatenate([kept, last], axis=1), shown)


@row_by_row
def shares_of(weights: Float[Array, "B N"], near: Int[Array, "B M K"]) -> Float[Array, "B M N"]:
    """The weights of the features near each kept one; 0 for others."""
    row, place = jnp.arange(near.shape[0])[:, None, None], jnp.arange(near.shape[1])[None, :, None]
    found = jnp.zeros((*near.shape[:2], weights.shape[1]))
    return found.at[row, place, near].set(weights[row, near])


def left_out(kept: Int[Array, "B K"], num_twice: Int[Array, "B"], size: int) -> Bool[Array, "B N"]:
    """Features summed in the last token: those not kept, without the first one per duplicate among the kept.

    Source: clip_encoder.py, complement_idx, which drops as many leading indices as there are kept ones.
    """
    others = ~marked(kept, size=size)
    return others & (jnp.cumsum(others, axis=1) > num_twice[:, None])

"""CDPruner: keeps features that are diverse and relevant to the question."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.layers.local_rows import row_by_row
from vlm_jax.reducers.divprune import cosines
from vlm_jax.reducers.reducer import GuidedByClip, Rule, every, marked, unit
from vlm_jax.types import Guidance, VisualFeatures

# Variance that is left of a feature that the selected ones already span, up to rounding; and scores below it.
_SPANNED = 1e-6
_MASKED, _TAKEN = -3.0, -jnp.inf


class CDPruner(GuidedByClip):
    """Keeps features by a determinantal point process that is conditioned on the question, in order.

    The kernel is the cosine of every two tokens, times the relevance of both; the subset with the largest determinant
    is built greedily. Relevance is minus the mean cosine of a patch to the question, both as CLIP embeds them, scaled
    to [0, 1].

    Source: Zhang et al. 2025 (CDPruner), section 3.3 and algorithm 1; llava_arch.py, encode_images. Similarity is of
    the connector's tokens, as there, and the question is cut into segments of the text tower's length, whose cosines
    are averaged; an instruction after the question counts as the question, where the release's evaluation cuts
    "Answer the question using a single word or phrase." off. Deviations of `exact`: relevance is scaled over the
    features of one image; an image of equal relevance has 1 throughout; where the kept features span all others,
    those with the highest relevance follow. By `as_released` the scale is over all images of the batch, and where
    the kernel's rank is below the budget, the square root of a negative number selects features twice, so that fewer
    are left.
    """

    kind: ClassVar[str] = "cdpruner"
    on_tokens: ClassVar[tuple[Rule, ...]] = ("exact", "as_released")

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        del deterministic
        if self.passes(features):
            return every(features)
        relevance = self.relevance(features)
        kernel = conditional_kernel(features, relevance)
        chosen = greedy_map(kernel, relevance, features.mask, count=self.num_kept, rule=self.rule)
        if self.rule == "exact":
            return self.take(features, jnp.sort(chosen, axis=1))
        chosen = marked(chosen, size=features.mask.shape[1])
        kept = jnp.argsort(~chosen, axis=1)[:, : self.num_kept]  # stable: in order, then what is not kept
        left = self.take(features, kept)
        return dataclasses.replace(left, mask=left.mask & jnp.take_along_axis(chosen, kept, axis=1))

    def relevance(self, features: VisualFeatures) -> Float[Array, "B N"]:
        """Minus the mean cosine of each feature to the question, scaled to [0, 1]; 0 where masked.

        Raises:
          ValueError: the features have no guidance.
        """
        found = -mean_cosine(self.guidance(features))
        if self.rule == "as_released":
            least, most = found.min(), found.max()
            return (found - least + 1e-6) / (most - least)
        mask = features.mask
        least = jnp.min(jnp.where(mask, found, jnp.inf), axis=1, keepdims=True)
        most = jnp.max(jnp.where(mask, found, -jnp.inf), axis=1, keepdims=True)
        return jnp.where(mask, (found - least + 1e-6) / (most - least + 1e-6), 0)


def mean_cosine(guidance: Guidance) -> Float[Array, "B N"]:
    """Of every feature the mean cosine to the segments of its image's question."""
    given = jax.lax.stop_gradient(guidance)
    weights = given.mask / jnp.maximum(given.mask.sum(axis=1, keepdims=True), 1)
    return jnp.einsum("bne,bse,bs->bn", unit(given.image), unit(given.text), weights, precision="highest")


def conditional_kernel(features: VisualFeatures, relevance: Float[Array, "B N"]) -> Float[Array, "B N N"]:
    """The cosine of every two features times the relevance of both."""
    return relevance[:, :, None] * cosines(features) * relevance[:, None]


@row_by_row
def greedy_map(
    kernel: Float[Array, "B N N"], relevance: Float[Array, "B N"], mask: Bool[Array, "B N"], *, count: int, rule: Rule
) -> Int[Array, "B K"]:
    """Indices of `count` features in the order of selection: each adds most to the logarithm of the determinant.

    By the rule `exact` features that the selected ones span follow by relevance, and masked ones come last; by
    `as_released` their variance becomes NaN, and nothing bars them from being selected again.
    """
    row = jnp.arange(mask.shape[0])

    def scores(variance: Float[Array, "B N"]) -> Float[Array, "B N"]:
        if rule == "as_released":
            return variance
        found = jnp.where(variance > _SPANNED, variance, relevance - 2)
        return jnp.where(variance == _TAKEN, _TAKEN, jnp.where(mask, found, _MASKED))

    def take(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rows, variance, chosen = state
        index = jnp.argmax(scores(variance), axis=1)
        left = variance[row, index][:, None]
        fresh = kernel[row, index] - jnp.einsum("kb,kbn->bn", rows[:, row, index], rows, precision="highest")
        if rule == "as_released":
            fresh = fresh / jnp.sqrt(left)
        else:
            fresh = jnp.where(left > _SPANNED, fresh / jnp.sqrt(jnp.maximum(left, _SPANNED)), 0)
        variance = (variance - jnp.square(fresh)).at[row, index].set(_TAKEN)
        return rows.at[step].set(fresh), variance, chosen.at[:, step].set(index)

    rows, chosen = jnp.zeros((count, *mask.shape), kernel.dtype), jnp.zeros((mask.shape[0], count), jnp.int32)
    return jax.lax.fori_loop(0, count, take, (rows, jnp.diagonal(kernel, axis1=1, axis2=2), chosen))[-1]

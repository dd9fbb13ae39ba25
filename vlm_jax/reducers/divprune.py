"""DivPrune: keeps a diverse subset of the features."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.layers.local_rows import row_by_row
from vlm_jax.ranges import Share
from vlm_jax.reducers.reducer import KeepsFeatures, Rule, every, real, unit
from vlm_jax.types import VisualFeatures

# Scores below any cosine distance: masked features, and features already selected.
_MASKED, _TAKEN = -1.0, -2.0


class DivPrune(KeepsFeatures):
    """Keeps features so that the minimum cosine distance between two of them is large.

    Greedy: selects first the feature whose nearest neighbour is farthest, then repeatedly the feature whose
    nearest selected feature is farthest. Features stay in order. By the rule `as_released` a feature may be
    selected twice, and is then repeated.

    Attributes:
      ratio: by `as_released`, the share of an image's features that is kept, rounded to the nearest integer (halves
        to even), as configured in the release; None for `num_kept`.

    Source: Alvar et al. 2025 (DivPrune), section 3.3 and algorithm 1. The release measures distances of tokens
    after the connector (`VLM.reduce` is `tokens`); the default here are features before it, so that any connector
    can follow.
    """

    kind: ClassVar[str] = "divprune"
    on_tokens: ClassVar[tuple[Rule, ...]] = ("as_released",)

    ratio: Share | None = None

    def num_left(self, count: int) -> int:
        """`num_kept`, or all where there are fewer; with `ratio`, its share of `count`."""
        if self.rule == "as_released" and self.ratio is not None:
            return round(self.ratio * count)
        return min(self.num_kept, count)

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        del deterministic
        if self.rule == "exact" and self.passes(features):
            return every(features)
        chosen = self.chosen(features)
        return self.take(features, jnp.sort(chosen, axis=1))

    def chosen(self, features: VisualFeatures) -> Int[Array, "B K"]:
        """Indices in the order of selection."""
        mask = features.mask
        distances = cosine_distances(features)
        if self.rule == "exact":
            alone = jnp.eye(mask.shape[1], dtype=bool)[None] | ~mask[:, None]
            first = jnp.min(jnp.where(alone, jnp.inf, distances), axis=-1)
        else:  # the second smallest, because the distance to itself is included
            first = second_smallest(jnp.where(mask[:, None], distances, jnp.inf))
        return farthest_first(
            distances, mask, first, count=self.num_left(mask.shape[1]), again=self.rule == "as_released"
        )


def cosine_distances(features: VisualFeatures) -> Float[Array, "B N N"]:
    """1 - cosine of every two features; 1 to masked features."""
    return 1 - cosines(features)


def cosines(features: VisualFeatures) -> Float[Array, "B N N"]:
    """Cosine of every two features, float32; 0 of masked features."""
    units = unit(real(jax.lax.stop_gradient(features.tokens), features.mask))
    return jnp.einsum("bnd,bmd->bnm", units, units, precision="highest")


@row_by_row
def second_smallest(distances: Float[Array, "B N N"]) -> Float[Array, "B N"]:
    """Of every feature, the second smallest distance."""
    return -jax.lax.top_k(-distances, 2)[0][..., 1]


@row_by_row
def farthest_first(
    distances: Float[Array, "B N N"], mask: Bool[Array, "B N"], first: Float[Array, "B N"], *, count: int, again: bool
) -> Int[Array, "B K"]:
    """Indices of `count` features in the order of selection; masked features come last.

    Args:
      distances: of every two features.
      mask: True where a feature is real.
      first: the score for selecting the first.
      count: number of features to select.
      again: whether a feature may be selected again, which happens at distances of 0.
    """
    row = jnp.arange(mask.shape[0])

    def take(carry, _):
        scores, least, taken = carry
        barred = jnp.zeros_like(taken) if again else taken
        chosen = jnp.argmax(jnp.where(barred, _TAKEN, jnp.where(mask, scores, _MASKED)), axis=1)
        least = jnp.minimum(least, distances[row, chosen])
        return (least, least, taken.at[row, chosen].set(True)), chosen

    start = first, jnp.full_like(first, jnp.inf), jnp.zeros_like(mask)
    return jax.lax.scan(take, start, length=count)[1].T

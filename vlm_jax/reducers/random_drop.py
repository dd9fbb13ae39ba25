"""The first control: keep a random subset of the features."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.budget import refuse
from vlm_jax.types import Grid, VisualFeatures


class RandomDrop(nn.Module):
    """Keeps `num_kept` features of every image, drawn without replacement, in their order.

    A new subset is drawn from the rng stream `reduce` at every call; with `deterministic` the
    draw is that of a fixed key, so that an evaluation repeats.

    Attributes:
      num_kept: features left, solved from the budget.
    """

    num_kept: int

    @classmethod
    def for_budget(cls, budget: int, grid: Grid) -> dict[str, Any]:
        """Any number of features up to all of them."""
        total = grid[0] * grid[1]
        if not 1 <= budget <= total:
            raise refuse("random", budget, grid, [1, total], "it can only drop features")
        return {"num_kept": budget}

    def image_size(self, height: int, width: int, grid: Grid) -> tuple[int, int]:
        """The image's own."""
        del grid
        return height, width

    def reduced_grid(self, grid: Grid) -> Grid:
        """One row: what is kept forms no rectangle."""
        del grid
        return (1, self.num_kept)

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        key = jax.random.key(0) if deterministic else self.make_rng("reduce")
        scores = jax.random.uniform(key, features.mask.shape)
        scores = jnp.where(features.mask, scores, -1.0)  # masked features go first
        kept = jnp.sort(jax.lax.top_k(scores, self.num_kept)[1], axis=-1)
        return VisualFeatures(
            jnp.take_along_axis(features.tokens, kept[..., None], axis=1),
            jnp.take_along_axis(features.mask, kept, axis=1),
            self.reduced_grid(features.grid),
        )

"""The first control: keep a random subset of the features."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from vlm_jax.reducers.reducer import KeepsFeatures, every, highest
from vlm_jax.types import VisualFeatures


class RandomDrop(KeepsFeatures):
    """Keeps `num_kept` features of every image, sampled without replacement, in order.

    Every image gets its own subset, sampled from the rng stream `reduce` at every call; with
    `deterministic` all use a fixed key, so that an answer does not depend on other images in the batch.
    """

    kind: ClassVar[str] = "random"

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        mask = features.mask
        if self.passes(features):
            return every(features)
        if deterministic:
            scores = jnp.broadcast_to(jax.random.uniform(jax.random.key(0), mask.shape[1:])[None], mask.shape)
        else:
            scores = jax.random.uniform(self.make_rng("reduce"), mask.shape)
        return self.take(features, highest(scores, mask, self.num_kept))

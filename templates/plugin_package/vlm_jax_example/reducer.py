"""Keeps the features nearest to the centre of the image."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from vlm_jax.layers.squares import in_rows
from vlm_jax.reducers.reducer import KeepsFeatures, every, highest
from vlm_jax.types import VisualFeatures


class Central(KeepsFeatures):
    """Keeps the `num_kept` features nearest to the centre; of equally near ones the first, and masked ones last."""

    kind: ClassVar[str] = "central"

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        del deterministic  # no randomness
        if self.passes(features):
            return every(features)
        features = in_rows(features, self.kind)
        rows, cols = (np.arange(size) - (size - 1) / 2 for size in features.grid)
        distance = (rows[:, None] ** 2 + cols**2).reshape(1, -1)
        scores = jnp.broadcast_to(jnp.asarray(-distance, jnp.float32), features.mask.shape)
        return self.take(features, highest(scores, features.mask, self.num_kept))

"""A system: a model with its processor, whatever it comes from."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlm_jax.processors.processor import Processor
from vlm_jax.types import Batch, Grid, RowShape


@dataclasses.dataclass(frozen=True)
class Budget:
    """Visual tokens of one image, with all its tiles or frames.

    Attributes:
      entering: tokens that enter the decoder; the most that can where every image has a grid of its own.
      by_layer: tokens in every layer of the decoder.
      grid: rows and columns of patches that the encoder gives for one tile; None where every image has its own.
    """

    entering: int
    by_layer: tuple[int, ...]
    grid: Grid | None = None

    @property
    def left(self) -> int:
        """Tokens in the last layer."""
        return self.by_layer[-1]

    @property
    def mean(self) -> float:
        """The mean over the decoder's layers."""
        return sum(self.by_layer) / len(self.by_layer)


@dataclasses.dataclass(frozen=True)
class System:
    """A vision-language model with what makes its batches; nothing in it has parameters.

    Attributes:
      model: the Linen module.
      processor: conversations and pictures to batches.
      ends: ids of the tokens that end an answer.
      budget: visual tokens of an image.
    """

    model: nn.Module
    processor: Processor
    ends: tuple[int, ...]
    budget: Budget

    def example(self, shape: RowShape) -> Batch:
        """Shapes of one training row with its images, for `eval_shape` and the planner."""
        row = self.processor.rows([[]], shape, targets=True)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), row)

    def init(self, key: jax.Array, shape: RowShape) -> dict[str, Any]:
        """Boxed parameters {part: tree}, drawn for rows of a shape, which no parameter depends on."""
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.example(shape))
        return dict(self.model.init({"params": key, "reduce": key}, zeros)["params"])

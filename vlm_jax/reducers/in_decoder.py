"""Reducers that work in the decoder: all visual tokens enter, and few reach its last layers."""

import abc
import dataclasses
from typing import ClassVar

from vlm_jax.budget import refuse
from vlm_jax.config import ConfigError
from vlm_jax.ranges import Natural
from vlm_jax.reducers.reducer import Part, PassesFeatures, PositionRule
from vlm_jax.types import Drop, Fields, Grid


class ReducesInDecoder(PassesFeatures):
    """Base of the reducers that drop visual tokens before some decoder layers; the budget is the number after the last.

    Attributes:
      num_kept: visual tokens of an image in the last layers, solved from the budget.
      num_features: features of an image.
      num_layers: layers of the decoder.
      num_shown: visual tokens of an image that enter the decoder from the connector; the number of
        features when None.
      positions: kept tokens keep their positions by default.
    """

    reduces_in: ClassVar[Part | None] = "decoder"

    num_kept: Natural
    num_features: Natural
    num_layers: Natural
    num_shown: Natural | None = None
    positions: PositionRule = dataclasses.field(default="keep", kw_only=True)

    @classmethod
    def for_budget(cls, budget: int, grid: Grid, num_layers: int) -> Fields:
        """Any number of tokens up to the number of features."""
        total = grid[0] * grid[1]
        if not 1 <= budget <= total:
            raise refuse(cls.kind, budget, grid, [1, total], "it can only drop tokens")
        return {"num_kept": budget, "num_features": total, "num_layers": num_layers}

    def connector_budget(self, grid: Grid) -> int:
        """`num_shown`."""
        del grid
        return self.num_features if self.num_shown is None else self.num_shown

    def required_fields(self) -> dict[Part, Fields]:
        """The decoder's `drops`.

        Raises:
          ConfigError: num_shown is below num_kept, or a layer is repeated or does not exist.
        """
        shown, drops = self.connector_budget((1, self.num_features)), self.drops()
        if shown < self.num_kept:
            raise ConfigError(
                f"config.reducer.num_shown: expected at least the {self.num_kept} tokens to keep "
                f"(config.token_budget), got {shown}"
            )
        layers = [drop.layer for drop in drops]
        if self.num_layers < 2:
            raise ConfigError(
                f"config.reducer: {self.kind} drops tokens between layers of the decoder, which has {self.num_layers}; "
                "raise config.decoder.depth, or choose another reducer"
            )
        if not layers or len(set(layers)) < len(layers) or any(not 1 <= layer < self.num_layers for layer in layers):
            raise ConfigError(
                f"config.reducer: {self.kind} drops tokens before layers {layers}; with {self.num_layers} decoder "
                f"layers, choose distinct layers from 1 to {self.num_layers - 1}"
            )
        return {"decoder": {"drops": drops}}

    @abc.abstractmethod
    def drops(self) -> tuple[Drop, ...]:
        """The drops in order: before which layer, and how many tokens are kept."""

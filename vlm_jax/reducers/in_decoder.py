"""Reducers that work in the decoder: all visual tokens enter, few reach its last layers."""

import abc
import dataclasses
from typing import Any, ClassVar

from vlm_jax.budget import refuse
from vlm_jax.config import ConfigError
from vlm_jax.reducers.reducer import Part, PassesFeatures, PositionRule
from vlm_jax.types import Drop, Grid


class ReducesInDecoder(PassesFeatures):
    """Tells the decoder before which of its layers to drop visual tokens; the budget is what is left at the end.

    Attributes:
      num_kept: visual tokens of an image in the last layers, solved from the budget.
      num_features: features of an image.
      num_layers: layers of the decoder.
      num_shown: visual tokens of an image that enter the decoder, which the connector makes; as many as there
        are features when None.
      positions: what is left keeps its positions, by default.
    """

    reduces_in: ClassVar[Part | None] = "decoder"

    num_kept: int
    num_features: int
    num_layers: int
    num_shown: int | None = None
    positions: PositionRule = dataclasses.field(default="keep", kw_only=True)

    @classmethod
    def for_budget(cls, budget: int, grid: Grid, num_layers: int) -> dict[str, Any]:
        """Any number of tokens up to that of the features."""
        total = grid[0] * grid[1]
        if not 1 <= budget <= total:
            raise refuse(cls.kind, budget, grid, [1, total], "it can only leave tokens out")
        return {"num_kept": budget, "num_features": total, "num_layers": num_layers}

    def connector_budget(self, grid: Grid) -> int:
        """`num_shown`."""
        del grid
        return self.num_features if self.num_shown is None else self.num_shown

    def required_fields(self) -> dict[Part, dict[str, Any]]:
        """The drops.

        Raises:
          ConfigError: fewer tokens are shown than are to be kept, or a layer that is named twice or that the
            decoder does not have.
        """
        shown, drops = self.connector_budget((1, self.num_features)), self.drops()
        if shown < self.num_kept:
            raise ConfigError(
                f"config.reducer.num_shown: {self.num_kept} tokens are to be left (config.token_budget), and only "
                f"{shown} are shown to the decoder"
            )
        layers = [drop.layer for drop in drops]
        if not layers or len(set(layers)) < len(layers) or any(not 1 <= layer < self.num_layers for layer in layers):
            raise ConfigError(
                f"config.reducer: {self.kind} drops tokens before layers {layers}; a decoder of {self.num_layers} "
                f"layers can do so before layers 1 to {self.num_layers - 1}, once before each"
            )
        return {"decoder": {"drops": drops}}

    @abc.abstractmethod
    def drops(self) -> tuple[Drop, ...]:
        """Before which layer how many tokens are kept, first to last."""

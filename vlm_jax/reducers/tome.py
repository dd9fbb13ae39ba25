"""ToMe: merges a few similar tokens in every block of the encoder."""

from typing import ClassVar

from vlm_jax.budget import refuse
from vlm_jax.layers.token_merging import merge_schedule
from vlm_jax.ranges import Natural
from vlm_jax.reducers.reducer import KeepsFeatures, Part
from vlm_jax.types import Fields, Grid, VisualFeatures


class ToMe(KeepsFeatures):
    """Makes the encoder merge tokens, so that it returns fewer features.

    Attributes:
      merged: tokens to merge in each block, solved from the budget; the same number in every block, but at
        most half, and in the last blocks the remainder.

    By the rule `as_released` tokens are in the order of the release: the unmerged ones of the first set, then
    the second set.

    Source: Bolya et al. 2023 (Token Merging), section 3; `layers.token_merging` merges.
    """

    kind: ClassVar[str] = "tome"
    reduces_in: ClassVar[Part | None] = "encoder"

    merged: tuple[Natural, ...]

    @classmethod
    def for_budget(cls, budget: int, grid: Grid, num_layers: int) -> Fields:
        """Any budget that halving in every block can reach."""
        total = grid[0] * grid[1]
        feasible = [kept for kept in range(1, total + 1) if merge_schedule(total, kept, num_layers) is not None]
        if budget not in feasible:
            why = f"each of the encoder's {num_layers} blocks can merge at most half of the tokens"
            raise refuse(cls.kind, budget, grid, feasible, why)
        return {"num_kept": budget, "merged": merge_schedule(total, budget, num_layers)}

    def required_fields(self) -> dict[Part, Fields]:
        """The encoder's `merged`."""
        return {"encoder": {"merged": self.merged, "merging": self.rule}}

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        """Returns the features, which the encoder merged, with its `kept`."""
        del deterministic
        return features

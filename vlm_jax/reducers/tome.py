"""ToMe: similar tokens become one, a few in every block of the encoder."""

from typing import Any, ClassVar

from vlm_jax.budget import refuse
from vlm_jax.layers.token_merging import merge_schedule
from vlm_jax.reducers.reducer import KeepsFeatures, Part
from vlm_jax.types import Grid, VisualFeatures


class ToMe(KeepsFeatures):
    """Has the encoder merge tokens; the features that come are those that are left.

    Attributes:
      merged: tokens that each block merges, solved from the budget; the same number in every block, but no
        more than half, and in the last ones what is left to merge.

    By the rule `as_released` tokens come in the order in which the release leaves them: those that stayed of the
    first set, and then the second.

    Source: Bolya et al. 2023 (Token Merging), section 3; `layers.token_merging` merges.
    """

    kind: ClassVar[str] = "tome"
    reduces_in: ClassVar[Part | None] = "encoder"

    merged: tuple[int, ...]

    @classmethod
    def for_budget(cls, budget: int, grid: Grid, num_layers: int) -> dict[str, Any]:
        """Any number that halving in every block can reach."""
        total = grid[0] * grid[1]
        feasible = [kept for kept in range(1, total + 1) if merge_schedule(total, kept, num_layers) is not None]
        if budget not in feasible:
            why = f"each of the encoder's {num_layers} blocks can merge at most half of the tokens"
            raise refuse(cls.kind, budget, grid, feasible, why)
        return {"num_kept": budget, "merged": merge_schedule(total, budget, num_layers)}

    def required_fields(self) -> dict[Part, dict[str, Any]]:
        """Blocks that merge."""
        return {"encoder": {"merged": self.merged, "merging": self.rule}}

    def __call__(self, features: VisualFeatures, *, deterministic: bool) -> VisualFeatures:
        """Features pass: the encoder merged them, and gave `kept`."""
        del deterministic
        return features

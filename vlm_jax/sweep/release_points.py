"""The points of a release's evaluation: training-free candidates at token budgets."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.config import ConfigError, convert, did_you_mean
from vlm_jax.connectors import CONNECTORS
from vlm_jax.pretrained.budgets import with_budget
from vlm_jax.ranges import Size
from vlm_jax.reducers import REDUCERS
from vlm_jax.system import System

UNREDUCED, AS_RELEASED = "none", "released"


@dataclasses.dataclass(frozen=True)
class ReleasePoint:
    """A release with a reducer at a token budget.

    Attributes:
      reducer: an entry of `REDUCERS`; `none` for the release's own tokens.
      token_budget: visual tokens of an image; None as released.
      system: the release with both; it has the release's parameters.
    """

    reducer: str
    token_budget: int | None
    system: System

    @property
    def label(self) -> str:
        """`reducer@budget`, also the folder name."""
        return label(self.reducer, self.token_budget)


@dataclasses.dataclass(frozen=True)
class RefusedPoint:
    """A point that cannot be evaluated.

    Attributes:
      label: as in `ReleasePoint`; without a budget where the candidate is infeasible at any.
      reason: the reason, and the fix.
    """

    label: str
    reason: str


def label(reducer: str, token_budget: int | None) -> str:
    """`visionzip@64`, or `none@released`."""
    return f"{reducer}@{AS_RELEASED if token_budget is None else token_budget}"


def is_guided(reducer: str) -> bool:
    """Whether a reducer chooses by the question, as CLIP embeds it."""
    kind = REDUCERS.get(reducer)
    return kind is not None and kind.guided_by is not None


def list_release_points(
    system: System, reducers: Sequence[str], budgets: Sequence[int], guidance: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[ReleasePoint], list[RefusedPoint]]:
    """Every reducer at every budget, and the unchanged release where `none` is among the reducers.

    Args:
      system: of the release; no tensor is read.
      reducers: names of `REDUCERS`. Names of `CONNECTORS` are returned as infeasible, since nothing is trained.
      budgets: visual tokens of an image.
      guidance: {field: value} of the reducers that are guided by the question, as of `GuidedReducer`.

    Returns:
      Points in the order given, and the infeasible ones.

    Raises:
      ConfigError: an unknown reducer, a budget out of range, or a text-only model.
    """
    for budget in budgets:
        convert(budget, Size, "--budgets")
    points: list[ReleasePoint] = []
    refused: list[RefusedPoint] = []
    for name in dict.fromkeys(reducers):
        if name not in REDUCERS and name not in CONNECTORS:
            raise ConfigError(f"--reducers: no reducer '{name}'{did_you_mean(name, REDUCERS)}")
        if name not in REDUCERS:
            reason = (
                "a connector, whose parameters would be random; train it with vlm_jax.cli.train, or "
                "compare trained connectors with vlm_jax.cli.sweep"
            )
            refused.append(RefusedPoint(name, reason))
            continue
        if name == UNREDUCED:
            points.append(ReleasePoint(name, None, with_budget(system, None, path="release")))
        for budget in dict.fromkeys(budgets):
            try:
                points.append(_point(system, name, budget, guidance if is_guided(name) else {}))
            except (InfeasibleBudget, ConfigError) as error:
                refused.append(RefusedPoint(label(name, budget), str(error)))
    return points, refused


def _point(system: System, name: str, budget: int, fields: Mapping[str, str]) -> ReleasePoint:
    if name != UNREDUCED:
        return ReleasePoint(name, budget, with_budget(system, budget, reducer={"kind": name, **fields}, path="release"))
    bounded = with_budget(system, budget, path="release")
    if bounded.processor.views == system.processor.views:
        raise InfeasibleBudget(f"an image takes no more than {budget} tokens as released, so nothing would change")
    return ReleasePoint(name, budget, bounded)

"""What an evaluation returns."""

import dataclasses

from vlm_jax.types import Fields


@dataclasses.dataclass(frozen=True)
class Report:
    """The numbers of an evaluation and what they are made from.

    Attributes:
      accuracy: {name: {"mean", "low", "high", "n"}}, shares with Wilson's 95% interval.
      rows: one per sample: `id`, `reference`, `answer`, `correct`.
      further: other entries of `evaluation.json`.
    """

    accuracy: dict[str, dict[str, float | int]]
    rows: list[Fields]
    further: Fields = dataclasses.field(default_factory=dict)

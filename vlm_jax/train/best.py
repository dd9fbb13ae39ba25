"""The best evaluation of a run, whose checkpoint is kept."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

from vlm_jax.config import ConfigError, did_you_mean
from vlm_jax.train.writers import scalars_of
from vlm_jax.types import Fields


@dataclasses.dataclass(frozen=True)
class Best:
    """By which number evaluations are compared; see `settings.LoopSettings`.

    Attributes:
      number: path of a number in the metrics, as `accuracy/vqa/mean`; None for no comparison.
      is_best: which value of it.
    """

    number: str | None = None
    is_best: Literal["highest", "lowest"] = "highest"

    def step(self, lines: Iterable[Fields]) -> int | None:
        """The step of the best of some lines of `evaluations.jsonl`, of equal ones the first; None without one.

        Raises:
          ConfigError: a line has no such number.
        """
        if self.number is None:
            return None
        sign = -1 if self.is_best == "highest" else 1
        values = [(sign * self._value(line), line["step"]) for line in lines]
        return min(((value, step) for value, step in values if not math.isnan(value)), default=(0, None))[1]

    def _value(self, line: Fields) -> float:
        numbers = scalars_of({key: value for key, value in line.items() if key != "settings"})
        if self.number not in numbers:
            raise ConfigError(
                f"config.loop.keep_best: the evaluation of step {line['step']} has no number "
                f"'{self.number}'{did_you_mean(str(self.number), numbers)}"
            )
        return numbers[self.number]

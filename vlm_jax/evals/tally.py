"""Counts over rows of answers, whose size does not grow with the number of rows."""

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vlm_jax.evals.vqa import share, short, tokens_left
from vlm_jax.types import Fields


@dataclasses.dataclass
class Tally:
    """Sums over answers.

    Attributes:
      right: sums of what is correct of answers, by task: their number where answers are right or wrong.
      asked: numbers of questions, by task.
      num_images: images of all samples.
      entering: visual tokens of these that enter the decoder.
      most: maximum of the entering tokens of one image.
      by_span: visual tokens of all prompts in the decoder's first layers, and after each drop.
    """

    right: defaultdict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    asked: Counter[str] = dataclasses.field(default_factory=Counter)
    num_images: int = 0
    entering: int = 0
    most: int = 0
    by_span: tuple[int, ...] = ()

    def add(self, row: Mapping[str, Any]) -> None:
        """Counts one answer: the fields `task`, `correct`, `visual_tokens` and `tokens_by_span` of an `Answer`."""
        self.asked[row["task"]] += 1
        self.right[row["task"]] += row["correct"]
        self.num_images += len(row["visual_tokens"])
        self.entering += sum(row["visual_tokens"])
        self.most = max([self.most, *row["visual_tokens"]])
        pairs = itertools.zip_longest(self.by_span, row["tokens_by_span"], fillvalue=0)
        self.by_span = tuple(total + count for total, count in pairs)

    def accuracy(self) -> dict[str, dict[str, float | int]]:
        """{task: {"mean", "low", "high", "n"}}, with Wilson's 95% interval."""
        return {task: share(self.right[task], asked) for task, asked in self.asked.items()}

    def realised(self) -> dict[str, float | int]:
        """{"mean", "max"} of the visual tokens of an image, over all images; 0 without images."""
        return {"mean": short(self.entering / max(self.num_images, 1)), "max": self.most}

    def left(self, model: Any) -> tuple[float | int, float | int]:
        """As `vqa.tokens_left`; 0 without answers."""
        return tokens_left(model, self.num_images, self.by_span) if self.by_span else (0, 0)


def shares(rows: Iterable[Fields], counted: Mapping[str, Callable[[Fields], bool]]) -> dict[str, Any]:
    """{name: {"mean", "low", "high", "n"}} of the rows for which each function is true."""
    right, asked = Counter[str](), 0
    for row in rows:
        asked += 1
        right.update(name for name, holds in counted.items() if holds(row))
    return {name: share(right[name], asked) for name in counted}

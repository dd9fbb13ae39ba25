"""What a run is evaluated by: rows of answers, one JSON object each, and metrics of these rows."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from vlm_jax.types import Fields, Params, Sample

Share = dict[str, float | int]  # "mean", "low", "high", "n" of a proportion, with Wilson's 95% interval


@runtime_checkable
class Evaluator(Protocol):
    """Asks a model what the evaluation data asks.

    All processes of a run call the methods alike; none of them writes anything.
    """

    @property
    def every(self) -> int | None:
        """Steps between evaluations during training; None for one at its end alone."""
        ...

    def check(self) -> None:
        """Raises the errors of faults in the evaluation data that are known without the model's answers."""
        ...

    def rows(self, params: Params) -> Iterator[Fields]:
        """One row for each sample, in order, as soon as it is answered; values are those of JSON."""
        ...

    def metrics(self, rows: Iterable[Fields]) -> Fields:
        """Numbers in nested sections, of rows that may have been read back from a file.

        Rows are read once, one at a time, and counted; none is kept.
        """
        ...

    def lines(self, metrics: Fields) -> list[str]:
        """The metrics as lines of text."""
        ...


def told(shares: dict[str, Share]) -> list[str]:
    """One line for each share."""
    return [
        f"{name}: {entry['mean']:.3f} ({entry['low']:.3f} to {entry['high']:.3f}, n={entry['n']})"
        for name, entry in shares.items()
    ]


def told_scores(scores: dict[str, dict[str, Share]]) -> list[str]:
    """One line for each value of the tasks whose values are not the mean alone, which `told` says of accuracies."""
    several = {task: values for task, values in scores.items() if set(values) != {"mean"}}
    return told({f"{task}, {name}": value for task, values in several.items() for name, value in values.items()})


def batched(samples: Iterable[Sample], size: int) -> Iterator[tuple[list[Sample], list[Sample]]]:
    """Samples in groups, read one group at a time, and each group padded to `size` by repeats of its last sample."""
    samples = iter(samples)
    while group := list(itertools.islice(samples, size)):
        yield group, group + [group[-1]] * (size - len(group))

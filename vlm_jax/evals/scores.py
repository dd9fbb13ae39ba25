"""The values of every task's metric, with bootstrap intervals, from rows of answers."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.evals.bootstrap import Bootstrap, total
from vlm_jax.evals.metrics import Metric, Response, metric_of
from vlm_jax.evals.metrics.yes_no import Mme
from vlm_jax.types import Fields

# Fields of a row that `Scores` reads.
SCORED = ("task", "question", "text", "references", "group", "is_finished")


def response_of(row: Mapping[str, Any]) -> Response:
    """The answer of a row with the fields of an `Answer`."""
    return Response(row["text"], tuple(row["references"]), row["question"], row["group"], row["is_finished"])


class Scores:
    """Values of metrics by task.

    Answers are not kept, but those of tasks whose metric needs all of them.

    Args:
      chosen: names of metrics by task, as of `metric_of`.
    """

    def __init__(self, chosen: Mapping[str, str]):
        self._chosen = chosen
        self._tasks: dict[str, tuple[Metric, Bootstrap]] = {}
        self._kept: dict[str, list[Response]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds the answer of a row."""
        task, response = row["task"], response_of(row)
        if task not in self._tasks:
            metric = metric_of(task, self._chosen)
            self._tasks[task] = metric, Bootstrap(metric)
        metric, bootstrap = self._tasks[task]
        if metric.needs_all:
            self._kept.setdefault(task, []).append(response)
        else:
            bootstrap.add(response.group, metric.statistics([response])[0])

    def bootstraps(self) -> dict[str, Bootstrap]:
        """{task: the sums of its answers}."""
        for task, responses in self._kept.items():
            metric, _ = self._tasks[task]
            bootstrap = Bootstrap(metric)
            for response, statistics in zip(responses, metric.statistics(responses), strict=True):
                bootstrap.add(response.group, statistics)
            self._tasks[task] = metric, bootstrap
        return {task: bootstrap for task, (_, bootstrap) in self._tasks.items()}

    def result(self) -> dict[str, dict[str, Fields]]:
        """{task: {value: {"mean", "low", "high", "n"}}}, as of `Bootstrap.result`; also totals of tasks of one kind."""
        found = {task: bootstrap.result() for task, bootstrap in self.bootstraps().items()}
        for kind, totals in self._totals().items():
            found[kind] = found.get(kind, {}) | totals
        return found

    def _totals(self) -> dict[str, dict[str, Fields]]:
        """{kind of tasks: {total: as of a value}}, of the totals all of whose subtasks have answers."""
        kinds: dict[str, dict[str, Bootstrap]] = {}
        for task, (metric, bootstrap) in self._tasks.items():
            kind, _, subtask = task.partition(":")
            if isinstance(metric, Mme):
                kinds.setdefault(kind, {})[subtask] = bootstrap
        found: dict[str, dict[str, Fields]] = {}
        for kind, parts in kinds.items():
            for name, subtasks in Mme.totals.items():
                if parts.keys() >= set(subtasks):
                    score = total([parts[subtask] for subtask in subtasks])["score"]
                    found.setdefault(kind, {})[name] = score
        return found

"""What every point retains of the scores at full budget, and the ranks of methods at each budget, with intervals.

All numbers are from one bootstrap: pictures are resampled, the same ones for all points, and where there are several
seeds these are resampled first. A replicate so has all points on the same questions of the same trainings.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from vlm_jax.evals.bootstrap import REPLICATES
from vlm_jax.evals.groups import GROUNDING, MULTI_TURN, OCR, group_of_task, is_multi_turn
from vlm_jax.evals.metrics import metric_of
from vlm_jax.evals.metrics.yes_no import Mme, Pope
from vlm_jax.evals.ranks import Rank, ranks
from vlm_jax.evals.scores import Scores
from vlm_jax.sweep.frontier import FrontierPoint, replace_whole
from vlm_jax.sweep.release_points import AS_RELEASED, UNREDUCED

RETAINED_FILE = "retained.json"
GROUPS = (OCR, GROUNDING, MULTI_TURN)

Replicates = Float[np.ndarray, "rows"]  # of all answers, then of each bootstrap replicate
ByTask = dict[str, Replicates]


@dataclasses.dataclass(frozen=True)
class Share:
    """Per cent of the score at full budget, with its 95% interval."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a point retains, of all benchmarks, of one, or of a group.

    Attributes:
      share: None where the full budget scores 0.
      rank: among the points of the same budget; None where there is no other.
    """

    share: Share | None
    rank: Rank | None = None


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a point retains.

    Attributes:
      label, connector, budget: of the point.
      overall: of all benchmarks, the mean of their per cent.
      benchmarks: by task; the subtasks of MME are one, whose score is their sum.
      groups: of those in `GROUPS` that have questions: the mean over their benchmarks.
    """

    label: str
    connector: str
    budget: int | str
    overall: Cell
    benchmarks: dict[str, Cell]
    groups: dict[str, Cell]


@dataclasses.dataclass(frozen=True)
class Retained:
    """What all points of a sweep or an evaluation retain.

    Attributes:
      full: label of the point with the full budget, which has 100%.
      seeds: that are resampled.
      points: in the order of the results.
    """

    full: str
    seeds: tuple[int, ...]
    points: tuple[Kept, ...]

    @property
    def benchmarks(self) -> list[str]:
        """Those of any point."""
        return list(dict.fromkeys(name for point in self.points for name in point.benchmarks))

    @property
    def groups(self) -> list[str]:
        """Likewise."""
        return [name for name in GROUPS if any(name in point.groups for point in self.points)]

    def write(self, path: epath.Path) -> None:
        """Writes all of it as JSON, over an earlier file."""
        replace_whole(path, (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())


def task_scores(rows: Iterable[Mapping[str, Any]], chosen: Mapping[str, str]) -> ByTask:
    """{task: its score, and that of each bootstrap replicate}.

    The score is the first value of the task's metric; F1 for POPE, and the score for subtasks of MME. Replicates of two
    points have the same questions, so that their ratios are paired.

    Args:
      rows: of answers, with the fields that `Scores` reads.
      chosen: names of metrics by task, as of `metric_of`.
    """
    return _read(rows, chosen).tasks


@dataclasses.dataclass(frozen=True)
class _Answers:
    """Scores of one point with one seed: of all answers by task, and of those to later questions of a conversation."""

    tasks: ByTask
    multi_turn: ByTask


def _read(rows: Iterable[Mapping[str, Any]], chosen: Mapping[str, str]) -> _Answers:
    of_all, later = Scores(chosen), Scores(chosen)
    for row in rows:
        of_all.add(row)
        if is_multi_turn(row):
            later.add(row)
    return _Answers(_drawn(of_all), _drawn(later))


def _drawn(scores: Scores) -> ByTask:
    found: ByTask = {}
    for task, bootstrap in scores.bootstraps().items():
        metric = bootstrap.metric
        shown = "score" if isinstance(metric, Mme) else "f1" if isinstance(metric, Pope) else metric.values[0]
        column = metric.values.index(shown)
        found[task] = np.concatenate([bootstrap.values[None], bootstrap.drawn])[:, column]
    return found


def of_benchmarks(scores: Mapping[str, Replicates], chosen: Mapping[str, str]) -> ByTask:
    """{benchmark: scores} of {task: scores}: the subtasks of MME are one benchmark, whose score is their sum."""
    found: ByTask = {}
    for task, values in scores.items():
        benchmark = task.partition(":")[0] if isinstance(metric_of(task, chosen), Mme) else task
        found[benchmark] = found[benchmark] + values if benchmark in found else values
    return found


def shares(ours: Mapping[str, Replicates], whole: Mapping[str, Replicates]) -> ByTask:
    """Per cent of the scores at full budget, by benchmark; NaN in replicates in which these are 0.

    A benchmark on which the full budget scores 0 is left out.
    """
    return {name: _ratio(100 * ours[name], whole[name]) for name in whole if name in ours and whole[name][0] > 0}


def told(values: Replicates) -> Share:
    """The per cent of all answers with its interval."""
    low, high = np.nanquantile(values[1:], (0.025, 0.975))
    return Share(float(values[0]), float(low), float(high))


def _ratio(above: Replicates, below: Replicates) -> Replicates:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def over_seeds(seeds: Sequence[ByTask]) -> ByTask:
    """Means over seeds, which every replicate draws with replacement.

    Points with as many seeds have the same draws. With n seeds the variance of their mean comes out too small by the
    factor (n - 1) / n, as of any bootstrap.

    Args:
      seeds: {task: scores} of each seed; tasks that one of them lacks are left out.
    """
    count = len(seeds)
    drawn = np.random.default_rng(0).multinomial(count, [1 / count] * count, REPLICATES)
    weights = np.concatenate([np.ones((1, count)), drawn]) / count
    names = [name for name in seeds[0] if all(name in one for one in seeds)]
    return {name: np.sum([weights[:, i] * one[name] for i, one in enumerate(seeds)], axis=0) for name in names}


Key = tuple[str, str]  # ("overall", ""), ("benchmark", name) or ("group", name)
OVERALL = "overall", ""


class _Scores:
    """Scores of all points, each read once.

    Args:
      points: of the report.
      answers: label of a run -> rows of its answers.
      chosen: names of metrics by task.
    """

    def __init__(
        self,
        points: Sequence[FrontierPoint],
        answers: Callable[[str], Iterable[Mapping[str, Any]]],
        chosen: Mapping[str, str],
    ):
        self._chosen = chosen
        self._runs = {
            point.label: {run["seed"]: _read(answers(run["label"]), chosen) for run in point.runs} for point in points
        }

    def common(self, labels: Iterable[str]) -> tuple[int, ...]:
        """Seeds that all of the points have."""
        return tuple(sorted(set.intersection(*(set(self._runs[label]) for label in labels))))

    def scores(self, label: str, seeds: Sequence[int]) -> dict[str, ByTask]:
        """{"": scores of all answers by benchmark, group: of its benchmarks} of a point."""
        runs = [self._runs[label][seed] for seed in seeds]
        tasks = over_seeds([run.tasks for run in runs])
        groups = {task: group_of_task(task, self._chosen) for task in tasks}
        parts = {"": tasks, MULTI_TURN: over_seeds([run.multi_turn for run in runs])}
        parts |= {name: {task: tasks[task] for task in tasks if groups[task] == name} for name in (OCR, GROUNDING)}
        return {name: of_benchmarks(part, self._chosen) for name, part in parts.items()}

    def shares(self, label: str, full: str, seeds: Sequence[int]) -> dict[Key, Replicates]:
        """Per cent of what `full` scores, of everything that a table shows."""
        ours, whole = self.scores(label, seeds), self.scores(full, seeds)
        parts = {name: shares(ours[name], whole[name]) for name in ours}
        found = {OVERALL if not name else ("group", name): _mean(part) for name, part in parts.items() if part}
        return found | {("benchmark", name): values for name, values in parts[""].items()}


def _mean(parts: ByTask) -> Replicates:
    return np.mean([*parts.values()], axis=0)


def retained(
    points: Sequence[FrontierPoint],
    answers: Callable[[str], Iterable[Mapping[str, Any]]],
    chosen: Mapping[str, str],
    controls: frozenset[str],
) -> Retained | None:
    """What all points retain, and their ranks.

    The full budget is the unreduced release where it was evaluated, else the candidate with the most tokens, of several
    the most accurate one.

    Args:
      points: of `combine_seeds`; their runs have a `label`.
      answers: label of a run -> rows of its answers.
      chosen: names of metrics by task, as of `metric_of`.
      controls: connectors that are no candidates for the full budget.

    Returns:
      None where there are only controls, or the full budget scores 0 everywhere.
    """
    full = _full(points, controls)
    if full is None:
        return None
    scores = _Scores(points, answers, chosen)
    cells = {point.label: _shares_of(scores, point.label, full) for point in points}
    placed = _ranked(scores, points, full)
    made = tuple(_kept(point, cells[point.label], placed[point.label]) for point in points if cells[point.label])
    return Retained(full, scores.common([full]), made) if made else None


def _full(points: Sequence[FrontierPoint], controls: frozenset[str]) -> str | None:
    released = f"{UNREDUCED}@{AS_RELEASED}"
    candidates = [point for point in points if point.connector not in controls and point.accuracy]
    if not candidates or any(point.label == released for point in candidates):
        return released if candidates else None

    def place(point: FrontierPoint) -> tuple[float, float]:
        means = [float(accuracy.mean) for accuracy in point.accuracy.values()]
        return float(point.costs["tokens"]), sum(means) / len(means)

    return max(candidates, key=place).label


def _shares_of(scores: _Scores, label: str, full: str) -> dict[Key, Share | None]:
    """Of everything that a table shows what a point retains; nothing if it has no seed of the full budget's."""
    seeds = scores.common([label, full])
    found = scores.shares(label, full, seeds) if seeds else {}
    return {key: told(values) for key, values in found.items()}


def _ranked(scores: _Scores, points: Sequence[FrontierPoint], full: str) -> dict[str, dict[Key, Rank]]:
    """{label: its ranks among the points of its budget}, by the seeds that all of these have."""
    placed: dict[str, dict[Key, Rank]] = {point.label: {} for point in points}
    budgets: dict[Any, list[str]] = {}
    for point in points:
        budgets.setdefault(point.runs[0]["token_budget"], []).append(point.label)
    for labels in budgets.values():
        seeds = scores.common([*labels, full])
        if len(labels) < 2 or not seeds:
            continue
        found = [scores.shares(label, full, seeds) for label in labels]
        for key in (key for key in found[0] if all(key in one for one in found)):
            for label, rank in zip(labels, ranks(np.stack([one[key] for one in found], axis=1)), strict=True):
                placed[label][key] = rank
    return placed


def _kept(point: FrontierPoint, cells: Mapping[Key, Share | None], placed: Mapping[Key, Rank]) -> Kept:
    def of_kind(kind: str) -> dict[str, Cell]:
        return {name: Cell(share, placed.get((of, name))) for (of, name), share in cells.items() if of == kind}

    overall = Cell(cells.get(OVERALL), placed.get(OVERALL))
    budget = point.runs[0]["token_budget"]
    return Kept(point.label, point.connector, budget, overall, of_kind("benchmark"), of_kind("group"))

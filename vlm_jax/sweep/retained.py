"""What every point retains of the scores at full budget, and the ranks of methods at each budget, with intervals.

All numbers are from one bootstrap: where there are several seeds these are resampled first, then pictures, the same
ones for all points. A replicate so has all points on the same questions of the same trainings.
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
from vlm_jax.evals.ranks import FEWEST, Rank, ranks
from vlm_jax.evals.scores import Scores
from vlm_jax.sweep.frontier import FrontierPoint, replace_whole
from vlm_jax.sweep.release_points import AS_RELEASED, UNREDUCED

RETAINED_FILE = "retained.json"
GROUPS = (OCR, GROUNDING, MULTI_TURN)

Replicates = Float[np.ndarray, "rows"]  # of all answers, then of each bootstrap replicate
ByTask = dict[str, Replicates]


@dataclasses.dataclass(frozen=True)
class Share:
    """Per cent of the score at full budget, with its 95% interval.

    Attributes:
      mean: of all answers.
      low, high: None where the full budget scores in fewer than `FEWEST` replicates.
    """

    mean: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a point retains, of all benchmarks, of one, or of a group.

    Attributes:
      share: of the score at full budget.
      rank: among the points of the same budget; None where there is no other, where one of them lacks the benchmark,
        or where they have no seed in common.
    """

    share: Share
    rank: Rank | None = None


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a point retains.

    Attributes:
      label, connector, budget: of the point.
      seeds: those of the full budget that the point has, of which its shares are.
      rank_seeds: those of them that all points of its budget have, of which its ranks are; empty without ranks.
      overall: of all benchmarks, the mean of their per cent.
      benchmarks: by task; the subtasks of MME are one, whose score is their sum.
      groups: of those in `GROUPS` that have questions: the mean over their benchmarks.
    """

    label: str
    connector: str
    budget: int | str
    seeds: tuple[int, ...]
    rank_seeds: tuple[int, ...]
    overall: Cell
    benchmarks: dict[str, Cell]
    groups: dict[str, Cell]


@dataclasses.dataclass(frozen=True)
class Retained:
    """What all points of a sweep or an evaluation retain.

    Attributes:
      full: label of the point with the full budget, which has 100%.
      seeds: of the full budget, which are resampled.
      has_turns: whether all rows of answers have `turns`; without them there is no group `MULTI_TURN`.
      points: in the order of the results.
      left_out: {label: reason} of the other points.
      unranked: budgets of several points that have no seed in common, and so no ranks.
    """

    full: str
    seeds: tuple[int, ...]
    has_turns: bool
    points: tuple[Kept, ...]
    left_out: dict[str, str]
    unranked: tuple[int | str, ...]

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
        replace_whole(path, (json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n").encode())


def write_retained(found: Retained | None, path: epath.Path) -> None:
    """Writes what is retained over an earlier file, or removes that where nothing is."""
    if found is not None:
        found.write(path)
    else:
        path.unlink(missing_ok=True)


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
    """Scores of one point with one seed.

    Attributes:
      tasks: of all answers.
      multi_turn: of those to later questions of a conversation; None where a row lacks `turns`.
    """

    tasks: ByTask
    multi_turn: ByTask | None


def _read(rows: Iterable[Mapping[str, Any]], chosen: Mapping[str, str]) -> _Answers:
    of_all, later, has_turns = Scores(chosen), Scores(chosen), True
    for row in rows:
        of_all.add(row)
        has_turns = has_turns and "turns" in row
        if has_turns and is_multi_turn(row):
            later.add(row)
    return _Answers(_drawn(of_all), _drawn(later) if has_turns else None)


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
    """The per cent of all answers with its interval, of the replicates with a number."""
    drawn = values[1:][np.isfinite(values[1:])]
    if len(drawn) < FEWEST:
        return Share(float(values[0]), None, None)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Share(float(values[0]), float(low), float(high))


def _ratio(above: Replicates, below: Replicates) -> Replicates:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def over_seeds(seeds: Sequence[ByTask]) -> ByTask:
    """Means over seeds; of n of them every replicate draws n - 1 with replacement.

    With one fewer than there are, the variance of the mean is that of independent trainings, s^2 / n, without bias.
    Points with as many seeds have the same draws. Of fewer than about five seeds intervals are still too short.

    Source: Rao and Wu 1988, "Resampling inference with complex survey data" (n - 1 draws).

    Args:
      seeds: {task: scores} of each seed; tasks that one of them lacks are left out.
    """
    count, size = len(seeds), max(1, len(seeds) - 1)
    drawn = np.random.default_rng(0).multinomial(size, [1 / count] * count, REPLICATES)
    weights = np.concatenate([np.full((1, count), 1 / count), drawn / size])
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
        self.has_turns = all(one.multi_turn is not None for runs in self._runs.values() for one in runs.values())

    def common(self, labels: Iterable[str]) -> tuple[int, ...]:
        """Seeds that all of the points have."""
        return tuple(sorted(set.intersection(*(set(self._runs[label]) for label in labels))))

    def scores(self, label: str, seeds: Sequence[int]) -> dict[str, ByTask]:
        """{"": scores of all answers by benchmark, group: of its benchmarks} of a point."""
        runs = [self._runs[label][seed] for seed in seeds]
        tasks = over_seeds([run.tasks for run in runs])
        groups = {task: group_of_task(task, self._chosen) for task in tasks}
        parts = {"": tasks}
        if self.has_turns:
            parts[MULTI_TURN] = over_seeds([run.multi_turn for run in runs if run.multi_turn is not None])
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
    seeds = {point.label: scores.common([point.label, full]) for point in points}
    cells, left_out = dict[str, dict[Key, Share]](), dict[str, str]()
    for label, common in seeds.items():
        found = scores.shares(label, full, common) if common else {}
        if OVERALL in found:
            cells[label] = {key: told(values) for key, values in found.items()}
        else:
            left_out[label] = f"no benchmark on which {full} scores" if common else f"no seed of {full}"
    if not cells:
        return None
    having = [point for point in points if point.label in cells]
    placed, unranked = _ranked(scores, having, full)
    made = tuple(_kept(one, seeds[one.label], cells[one.label], placed.get(one.label)) for one in having)
    return Retained(full, seeds[full], scores.has_turns, made, left_out, unranked)


def _full(points: Sequence[FrontierPoint], controls: frozenset[str]) -> str | None:
    released = f"{UNREDUCED}@{AS_RELEASED}"
    candidates = [point for point in points if point.connector not in controls and point.accuracy]
    if not candidates or any(point.label == released for point in candidates):
        return released if candidates else None

    def place(point: FrontierPoint) -> tuple[float, float]:
        means = [float(accuracy.mean) for accuracy in point.accuracy.values()]
        return float(point.costs["tokens"]), sum(means) / len(means)

    return max(candidates, key=place).label


@dataclasses.dataclass(frozen=True)
class _Placed:
    """The ranks of a point, and the seeds that they are of."""

    seeds: tuple[int, ...]
    ranks: dict[Key, Rank]


def _ranked(
    scores: _Scores, points: Sequence[FrontierPoint], full: str
) -> tuple[dict[str, _Placed], tuple[int | str, ...]]:
    """{label: its ranks among the points of its budget}, by the seeds that all of these have; budgets without any."""
    placed, unranked = dict[str, _Placed](), list[int | str]()
    budgets: dict[int | str, list[str]] = {}
    for point in points:
        budgets.setdefault(point.runs[0]["token_budget"], []).append(point.label)
    for budget, labels in budgets.items():
        if len(labels) < 2:
            continue
        seeds = scores.common([*labels, full])
        if not seeds:
            unranked.append(budget)
            continue
        found = [scores.shares(label, full, seeds) for label in labels]
        placed |= {label: _Placed(seeds, {}) for label in labels}
        for key in (key for key in found[0] if all(key in one for one in found)):
            for label, rank in zip(labels, ranks(np.stack([one[key] for one in found], axis=1)), strict=True):
                placed[label].ranks[key] = rank
    return placed, tuple(unranked)


def _kept(point: FrontierPoint, seeds: tuple[int, ...], cells: Mapping[Key, Share], placed: _Placed | None) -> Kept:
    ranks_of = {} if placed is None else placed.ranks

    def of_kind(kind: str) -> dict[str, Cell]:
        return {name: Cell(share, ranks_of.get((of, name))) for (of, name), share in cells.items() if of == kind}

    return Kept(
        label=point.label,
        connector=point.connector,
        budget=point.runs[0]["token_budget"],
        seeds=seeds,
        rank_seeds=() if placed is None else placed.seeds,
        overall=Cell(cells[OVERALL], ranks_of.get(OVERALL)),
        benchmarks=of_kind("benchmark"),
        groups=of_kind("group"),
    )

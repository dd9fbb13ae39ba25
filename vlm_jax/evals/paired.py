"""Whether two runs differ: differences of their metrics on the same questions."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vlm_jax.evals.bootstrap import repetitions
from vlm_jax.evals.metrics import Metric, metric_of
from vlm_jax.evals.scores import response_of

PERMUTATIONS = 10_000
BLOCK = 500  # permutations, or replicates, at a time
MAX_EXACT = 12  # groups of which all permutations are made


class DifferentQuestions(ValueError):
    """Two runs that did not answer the same questions."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One value of one task's metric in two runs.

    Attributes:
      task, value: of which it is.
      ours, theirs: the value in each run.
      low, high: 95% interval of the difference, ours - theirs, by the paired bootstrap.
      p_value: of the paired permutation test, two-sided: how often runs that are the same but for their names differ by
        as much.
      n: questions of the task.
    """

    task: str
    value: str
    ours: float
    theirs: float
    low: float
    high: float
    p_value: float
    n: int


def differences(
    ours: Iterable[Mapping[str, Any]], theirs: Iterable[Mapping[str, Any]], chosen: Mapping[str, str]
) -> list[Difference]:
    """The differences of all values of all tasks.

    Answers about the same pictures are resampled, and exchanged between the runs, together.

    Args:
      ours, theirs: rows of answers of the two runs, in any order.
      chosen: names of metrics by task, as of `metric_of`.

    Raises:
      DifferentQuestions: the runs have other questions.

    Source: Efron and Tibshirani 1993, sections 15.2 (permutation test) and 16.2; Koehn 2004 for metrics of a corpus.
    """
    rows, others = ({row["sample_id"]: row for row in run} for run in (ours, theirs))
    _check_questions(rows, others)
    by_task: dict[str, list[str]] = {}
    for name, row in rows.items():
        by_task.setdefault(row["task"], []).append(name)
    found = []
    for task, names in by_task.items():
        metric = metric_of(task, chosen)
        sums = [_summed(metric, [run[name] for name in names]) for run in (rows, others)]
        groups = list(sums[0])
        mine, other = (np.stack([of_run[group] for group in groups]) for of_run in sums)
        found += _compared(metric, task, groups, mine, other, len(names))
    return found


def _check_questions(ours: Mapping[str, Mapping[str, Any]], theirs: Mapping[str, Mapping[str, Any]]) -> None:
    alone = sorted(set(ours) ^ set(theirs))
    changed = [name for name in ours if name in theirs and ours[name]["group"] != theirs[name]["group"]]
    changed += [name for name in ours if name in theirs and ours[name]["question"] != theirs[name]["question"]]
    if alone or changed:
        name = (alone or changed)[0]
        what = "is of one run only" if alone else "has another question or other pictures"
        raise DifferentQuestions(
            f"expected two runs that answered the same questions, but sample '{name}' {what} ({len(alone)} samples are "
            f"of one run only, {len(set(changed))} differ); use evaluations of the same data, with the same seed and "
            "turns"
        )


def _summed(metric: Metric, rows: Sequence[Mapping[str, Any]]) -> dict[str, Float[np.ndarray, "statistics"]]:
    """{group: sums of the statistics of its answers}."""
    responses, sums = [response_of(row) for row in rows], {}
    for response, statistics in zip(responses, metric.statistics(responses), strict=True):
        sums[response.group] = sums.get(response.group, 0) + statistics
    return sums


def _compared(
    metric: Metric,
    task: str,
    groups: Sequence[str],
    ours: Float[np.ndarray, "groups statistics"],
    theirs: Float[np.ndarray, "groups statistics"],
    count: int,
) -> list[Difference]:
    mine, other = metric.of_sums(ours.sum(axis=0)), metric.of_sums(theirs.sum(axis=0))
    weights = np.stack([repetitions(group) for group in groups]).astype(float)
    replicates = metric.of_sums(weights.T @ ours) - metric.of_sums(weights.T @ theirs)
    replicates = replicates[weights.any(axis=0)]
    low, high = np.quantile(replicates, (0.025, 0.975), axis=0) if len(replicates) else (mine - other,) * 2
    p_values = _p_values(metric, ours, theirs)
    return [
        Difference(task, name, float(one), float(two), float(least), float(most), float(p_value), count)
        for name, one, two, least, most, p_value in zip(metric.values, mine, other, low, high, p_values, strict=True)
    ]


def _p_values(
    metric: Metric, ours: Float[np.ndarray, "groups statistics"], theirs: Float[np.ndarray, "groups statistics"]
) -> Float[np.ndarray, "values"]:
    """Of every value: the share of exchanges of groups between the runs that differ by as much as the runs."""
    total = ours.sum(axis=0) + theirs.sum(axis=0)
    observed = np.abs(metric.of_sums(ours.sum(axis=0)) - metric.of_sums(theirs.sum(axis=0)))
    as_large, made = np.zeros(len(observed)), 0
    for kept in _exchanges(len(ours)):
        sums = kept @ ours + ~kept @ theirs
        drawn = np.abs(metric.of_sums(sums) - metric.of_sums(total - sums))
        as_large += np.sum(drawn >= observed - 1e-12, axis=0)
        made += len(kept)
    # Of drawn exchanges, the runs as they are count as one more.
    return as_large / made if len(ours) <= MAX_EXACT else (as_large + 1) / (made + 1)


def _exchanges(count: int) -> Iterable[Bool[np.ndarray, "exchanges groups"]]:
    """Which of the groups stay in their run: all possibilities if they are few, else drawn ones, in blocks."""
    if count <= MAX_EXACT:
        yield (np.arange(1 << count)[:, None] >> np.arange(count)) & 1 == 1
        return
    rng = np.random.default_rng(0)
    for _ in range(PERMUTATIONS // BLOCK):
        yield rng.random((BLOCK, count)) < 0.5


def told_differences(found: Sequence[Difference]) -> list[str]:
    """One line for each difference."""
    return [
        f"{one.task}, {one.value}: {one.ours:.3f} against {one.theirs:.3f}, difference {one.ours - one.theirs:+.3f} "
        f"({one.low:+.3f} to {one.high:+.3f}), p={one.p_value:.2g}, n={one.n}"
        for one in found
    ]

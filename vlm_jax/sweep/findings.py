"""What a sweep found on a task: the best point, and the fewest tokens that are as good or nearly so."""

import dataclasses
from collections.abc import Sequence

from vlm_jax.sweep.frontier import FrontierPoint, Number

TOLERANCES = (1, 5)  # percentage points


@dataclasses.dataclass(frozen=True)
class Enough:
    """The fewest tokens that lose at most some percentage points of the accuracy at full budget.

    Attributes:
      points_lost: that may be lost.
      full: the candidate with the most tokens; of several the most accurate.
      by_mean: the candidate with the fewest tokens whose mean over seeds loses no more.
      by_seed: {seed: the fewest tokens of the candidates whose accuracy with this seed loses no more}, for the seeds of
        `full`.
    """

    points_lost: int
    full: FrontierPoint
    by_mean: FrontierPoint
    by_seed: dict[int, Number]


@dataclasses.dataclass(frozen=True)
class Finding:
    """Summary of the results on one task.

    A point is as good as the best when its accuracy is in the best point's interval, or above it.

    Attributes:
      task: the task.
      best: the candidate with the highest accuracy; a control only if there are no others.
      fewest_tokens: the candidate with the fewest tokens that is as good.
      fewest_flops: the candidate with the fewest FLOPs that is as good.
      controls: the controls with no more tokens than `fewest_tokens`, best first.
      rivals: the controls among them that are as good.
      enough: for each tolerance, the fewest tokens that lose no more of the full budget's accuracy.
    """

    task: str
    best: FrontierPoint
    fewest_tokens: FrontierPoint
    fewest_flops: FrontierPoint
    controls: tuple[FrontierPoint, ...]
    rivals: tuple[FrontierPoint, ...]
    enough: tuple[Enough, ...]


def find(points: Sequence[FrontierPoint], task: str, controls: frozenset[str]) -> list[Finding]:
    """The finding on a task: one, or none where only controls were evaluated on it."""
    measured = [point for point in points if task in point.accuracy]
    candidates = [point for point in measured if point.connector not in controls]
    if not candidates:
        return []

    def mean(point: FrontierPoint) -> Number:
        return point.accuracy[task].mean

    best = max(candidates, key=lambda point: (mean(point), -point.costs["tokens"], -point.costs["flops"]))
    floor = best.accuracy[task].low
    as_good = [point for point in candidates if mean(point) >= floor]
    fewest_tokens = min(as_good, key=lambda point: (point.costs["tokens"], -mean(point), point.costs["flops"]))
    fewest_flops = min(as_good, key=lambda point: (point.costs["flops"], -mean(point), point.costs["tokens"]))
    beside = [
        point
        for point in measured
        if point.connector in controls and point.costs["tokens"] <= fewest_tokens.costs["tokens"]
    ]
    beside.sort(key=mean, reverse=True)
    rivals = tuple(point for point in beside if mean(point) >= floor)
    enough = tuple(_enough(candidates, task, points) for points in TOLERANCES)
    return [Finding(task, best, fewest_tokens, fewest_flops, tuple(beside), rivals, enough)]


def _enough(candidates: Sequence[FrontierPoint], task: str, points_lost: int) -> Enough:
    most = max(point.costs["tokens"] for point in candidates)
    full = max((p for p in candidates if p.costs["tokens"] == most), key=lambda point: point.accuracy[task].mean)
    accuracy, lost = full.accuracy[task], points_lost / 100 + 1e-9  # shares that differ by exactly the tolerance count
    near = [point for point in candidates if point.accuracy[task].mean >= accuracy.mean - lost]
    by_seed = {}
    for seed, share in accuracy.seeds.items():
        seeds = ((point, point.accuracy[task].seeds.get(seed)) for point in candidates)
        kept = (point for point, own in seeds if own is not None and own >= share - lost)
        by_seed[seed] = min(point.costs["tokens"] for point in kept)

    def rank(point: FrontierPoint) -> tuple[Number, ...]:
        return point.costs["tokens"], -point.accuracy[task].mean, point.costs["flops"]

    return Enough(points_lost, full, min(near, key=rank), by_seed)

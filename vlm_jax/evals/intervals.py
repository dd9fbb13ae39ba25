"""95% intervals: of a proportion, and of the mean of several trainings."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


def wilson_interval(successes: int | float, trials: int) -> tuple[float, float]:
    """The 95% interval of a proportion.

    Args:
      successes: their number, or the sum of shares in [0, 1].
      trials: their number.

    Raises:
      ValueError: no trials.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4.
    """
    if trials < 1:
        raise ValueError("expected at least one trial, got none")
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == trials else min(1.0, centre + half)


@dataclasses.dataclass(frozen=True)
class Trainings:
    """Shares of right answers of one point of a sweep, one for each seed.

    Attributes:
      shares: in [0, 1].
      questions: that each is of.
    """

    shares: tuple[float, ...]
    questions: int


def intervals_over_seeds(points: Sequence[Trainings]) -> list[tuple[float, float]]:
    """95% intervals of the points' means, which hold the spread of trainings and of questions.

    Few seeds say little of one point's spread, and many points say much of the usual one: the variance between a
    point's seeds is moderated by that of all points, and the interval is that of the moderated t statistic (Smyth
    2004, "Linear models and empirical Bayes methods", sections 3 and 4). Shares are compared as arcsin(sqrt(share)),
    whose variance from counting n questions is 1 / 4n wherever the share lies; no variance is taken to be less. A point
    of one seed gets the usual variance.

    Args:
      points: of one task of one sweep.

    Returns:
      (low, high) of each point.

    Raises:
      ValueError: no point has two seeds.
    """
    degrees = np.array([len(point.shares) - 1 for point in points])
    if not degrees.any():
        raise ValueError("expected two seeds of a point or more, got one of each")
    angles = [np.arcsin(np.sqrt(point.shares)) for point in points]
    counted = np.array([1 / (4 * point.questions) for point in points])
    own = np.array([np.var(angle, ddof=1) if len(angle) > 1 else 0.0 for angle in angles])
    several = degrees > 0
    usual, weight = _usual(own[several], degrees[several])
    # What the other points can say is not more than the seeds that they have.
    weights = np.minimum(weight, degrees.sum() - degrees)
    variances = np.maximum((weights * usual + degrees * own) / (weights + degrees), counted)
    made = []
    for angle, variance, degree in zip(angles, variances, weights + degrees, strict=True):
        half = stats.t.ppf(0.975, degree) * math.sqrt(variance / len(angle))
        low, high = max(0.0, angle.mean() - half), min(math.pi / 2, angle.mean() + half)
        made.append((math.sin(low) ** 2, math.sin(high) ** 2))
    return made


def _usual(variances: Float[np.ndarray, "points"], degrees: Int[np.ndarray, "points"]) -> tuple[float, float]:
    """The usual variance, and its weight in degrees of freedom; infinite where points differ no more than by chance.

    The variances are taken to be a multiple of an F distribution, whose two parameters are those of their mean and
    variance: unlike logarithms, these hold where the seeds of a point agree exactly.
    """
    mean, degree = float(np.average(variances, weights=degrees)), float(degrees.mean())
    if mean == 0:
        return 0.0, math.inf
    spread = float(np.var(variances, ddof=1)) / mean**2 if len(variances) > 1 else 0.0
    if degree * spread <= 2:
        return mean, math.inf
    weight = (4 * degree * spread + 2 * degree - 4) / (degree * spread - 2)
    return mean * (weight - 2) / weight, weight

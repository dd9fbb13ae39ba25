"""Ranks of methods by their scores, with the uncertainty that the bootstrap gives them."""

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

FEWEST = 100  # replicates that an interval needs
DECIMALS = 9  # scores that differ by less are equal: sums of the same numbers in another order


@dataclasses.dataclass(frozen=True)
class Rank:
    """The rank of a method among others; 1 is the best, and equal ones share the mean of their ranks.

    Attributes:
      rank: by the scores of all answers.
      low, high: 95% interval of the rank over the replicates; None where fewer than `FEWEST` have a score.
      best: share of the replicates in which the method has the highest score; equal ones share it. Likewise.
    """

    rank: float
    low: float | None
    high: float | None
    best: float | None


def ranks(scores: Float[np.ndarray, "rows methods"]) -> list[Rank]:
    """The rank of every method.

    Replicates have to be paired: one row has the scores of all methods on the same resampled answers, so that
    questions which are hard for all of them do not count as uncertainty of the order.

    Args:
      scores: higher is better; of all answers first, then of each replicate. Replicates with a score that is not a
        number are left out.

    Source: Goldstein and Spiegelhalter 1996, "League tables and their limitations" (intervals of ranks).
    """
    scores = np.round(scores, DECIMALS)
    drawn = scores[1:][np.isfinite(scores[1:]).all(axis=1)]
    (observed,) = rankdata(-scores[:1], axis=1)
    if len(drawn) < FEWEST:
        return [Rank(float(rank), None, None, None) for rank in observed]
    placed = rankdata(-drawn, axis=1)
    highest = drawn == drawn.max(axis=1, keepdims=True)
    best = (highest / highest.sum(axis=1, keepdims=True)).mean(axis=0)
    low = np.quantile(placed, 0.025, axis=0, method="lower")
    high = np.quantile(placed, 0.975, axis=0, method="higher")
    return [Rank(*map(float, of_method)) for of_method in zip(observed, low, high, best, strict=True)]

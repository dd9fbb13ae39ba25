"""Bootstrap intervals of any function of sums, in one pass and in constant memory."""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from vlm_jax.evals.metrics import Metric
from vlm_jax.types import Fields

REPLICATES = 1000
# Probabilities of at most 0, 1, … repetitions in a Poisson distribution of mean 1.
_AT_MOST = np.cumsum(np.exp(-1) / np.cumprod([1.0, *range(1, 12)]))


@functools.lru_cache(maxsize=64)
def repetitions(group: str) -> Int[np.ndarray, "replicates"]:
    """How often a group of answers is in each of the replicates.

    It depends on the group alone, so that replicates of two runs, or of parts of one, have the same groups: their
    differences are those of paired samples, and sums of parts are those of the whole.
    """
    key = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=16).digest())
    drawn = np.random.Generator(np.random.Philox(key=key)).random(REPLICATES)
    return np.searchsorted(_AT_MOST, drawn)


class Bootstrap:
    """Statistics of a metric, summed over answers, and over the answers of each replicate.

    A group of answers, those about the same pictures, is resampled as a whole, a Poisson number of times.

    Args:
      metric: of the answers.

    Attributes:
      metric: likewise.
      sums: of all answers.
      replicates: of the answers of each replicate.
      count: answers.

    Source: Efron and Tibshirani 1993, chapter 13 (percentile interval) and section 8.6 (groups); Chamandy et al. 2012,
    "Estimating uncertainty for massive data streams", section 3 (Poisson numbers).
    """

    def __init__(self, metric: Metric):
        self.metric = metric
        self.sums: Float[np.ndarray, "statistics"] = np.zeros(metric.num_statistics)
        self.replicates: Float[np.ndarray, "replicates statistics"] = np.zeros((REPLICATES, metric.num_statistics))
        self.count = 0

    def add(self, group: str, statistics: Float[np.ndarray, "statistics"]) -> None:
        """Adds an answer."""
        self.sums += statistics
        self.replicates += repetitions(group)[:, None] * statistics
        self.count += 1

    def result(self) -> dict[str, Fields]:
        """{value: {"mean", "low", "high", "n"}}: the value, its 95% interval, and the number of answers."""
        return total([self])

    @property
    def values(self) -> Float[np.ndarray, "values"]:
        """The metric's values of all answers."""
        return self.metric.of_sums(self.sums)

    @property
    def drawn(self) -> Float[np.ndarray, "replicates values"]:
        """The metric's values of each replicate."""
        return self.metric.of_sums(self.replicates)


def total(parts: Sequence[Bootstrap]) -> dict[str, Fields]:
    """The sums of several tasks' values, as of `Bootstrap.result`.

    Args:
      parts: of the tasks, at least one, all with the same metric; a group of answers may be in several.
    """
    of_all, drawn = sum(part.values for part in parts), sum(part.drawn for part in parts)
    assert isinstance(of_all, np.ndarray) and isinstance(drawn, np.ndarray)
    # A replicate of few groups may be empty.
    drawn = drawn[np.all([part.replicates.any(axis=1) for part in parts], axis=0)]
    ends = np.quantile(drawn, (0.025, 0.975), axis=0) if len(drawn) else np.stack([of_all] * 2)
    count = sum(part.count for part in parts)
    return {
        name: {"mean": float(value), "low": float(low), "high": float(high), "n": count}
        for name, value, low, high in zip(parts[0].metric.values, of_all, *ends, strict=True)
    }

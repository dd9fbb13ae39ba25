"""Ranks and their uncertainty: by hand, and against the distribution of a paired Poisson bootstrap."""

import numpy as np
import pytest
from scipy.stats import skellam

from vlm_jax.evals.bootstrap import repetitions
from vlm_jax.evals.ranks import Rank, ranks


def test_ranks_by_hand():
    """Four replicates, 25 times each, and one without a score; equal scores share ranks, and share being the best.

    With one replicate less than a hundred there is neither an interval nor a share.
    """
    rows = [(0.5, 0.5, 0.7), *25 * [(1, 2, 3), (3, 2, 1), (2, 2, 1), (0.1 + 0.2, 0.3, 0)], (np.nan, 2, 1)]
    assert ranks(np.array(rows)) == [
        Rank(2.5, 1.0, 3.0, (0 + 1 + 0.5 + 0.5) / 4),
        Rank(2.5, 1.5, 2.0, (0 + 0 + 0.5 + 0.5) / 4),
        Rank(1.0, 1.0, 3.0, 1 / 4),
    ]
    few = np.array([rows[0], *rows[2:]])
    assert ranks(few) == [Rank(2.5, None, None, None), Rank(2.5, None, None, None), Rank(1.0, None, None, None)]


def test_how_often_a_method_is_the_best_is_the_chance_that_its_own_right_answers_are_drawn_more_often():
    """Six questions only one method answers, three only the other; those that both answer do not count."""
    right = np.array([[True] * 6 + [False] * 3 + [True] * 20, [False] * 6 + [True] * 3 + [True] * 20]).T
    counts = np.stack([np.ones(1000), *(repetitions(f"{place}") for place in range(len(right)))])[1:]
    drawn = (counts.T @ right) / counts.sum(axis=0)[:, None]
    first, second = ranks(np.concatenate([right.mean(axis=0)[None], drawn]))
    chance = skellam.sf(0, 6, 3) + skellam.pmf(0, 6, 3) / 2
    assert first.best == pytest.approx(chance, abs=0.03) and second.best == pytest.approx(1 - first.best)
    assert (first.rank, first.low, first.high) == (1, 1, 2)

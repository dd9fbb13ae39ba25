"""Intervals over seeds against Student's t, and their coverage by simulation."""

import numpy as np
import pytest
import scipy.stats

from vlm_jax.evals.intervals import Trainings, _usual, intervals_over_seeds


def test_two_points_whose_seeds_spread_alike_share_their_variance():
    points = [Trainings((0.5, 0.6, 0.7), 10**9), Trainings((0.2, 0.3, 0.4), 10**9)]
    angles = np.arcsin(np.sqrt([point.shares for point in points]))
    own = angles.var(axis=1, ddof=1)
    for mean, variance, ends in zip(angles.mean(axis=1), own, intervals_over_seeds(points), strict=True):
        half = scipy.stats.t.ppf(0.975, 4) * np.sqrt((own.mean() + variance) / 2 / 3)  # 2 degrees of each
        assert ends == pytest.approx(np.sin([mean - half, mean + half]) ** 2)


def test_seeds_that_agree_have_the_interval_of_their_questions():
    (low, high), _ = intervals_over_seeds([Trainings((0.9, 0.9), 100), Trainings((0.5, 0.5), 100)])
    centre, half = np.arcsin(np.sqrt(0.9)), scipy.stats.t.ppf(0.975, 2) * np.sqrt(1 / 400 / 2)
    assert (low, high) == pytest.approx(tuple(np.sin([centre - half, centre + half]) ** 2))


@pytest.mark.parametrize("num_seeds", [2, 5])
def test_intervals_hold_the_mean_95_times_in_100(num_seeds):
    """Points whose trainings spread unequally, as on a slope and on a plateau."""
    rng, held = np.random.default_rng(0), []
    for _ in range(200):
        truth, spread = rng.uniform(0.1, 0.97, 24), rng.choice([0.02, 0.05, 0.1], 24)
        centre = np.arcsin(np.sqrt(truth))
        angles = np.clip(centre + rng.normal(0, spread, (num_seeds, 24)), 0, np.pi / 2)
        shares = rng.binomial(200, np.sin(angles) ** 2) / 200
        ends = intervals_over_seeds([Trainings(tuple(column), 200) for column in shares.T])
        held += [low <= mean <= high for (low, high), mean in zip(ends, truth, strict=True)]
    assert 0.92 < np.mean(held) < 0.97


def test_the_usual_variance_is_that_of_which_variances_are_drawn():
    """Smyth 2004, section 4: variances of d degrees are s² F(d, d0), of which s² and d0 are found."""
    drawn = 2.5 * scipy.stats.f(4, 30).rvs(400_000, random_state=0)
    usual, weight = _usual(drawn, np.full(len(drawn), 4))
    assert usual == pytest.approx(2.5, rel=0.01) and weight == pytest.approx(30, rel=0.1)


def test_variances_that_differ_by_chance_are_pooled_by_their_degrees():
    assert _usual(np.array([1.0, 2.0]), np.array([1, 3])) == (7 / 4, np.inf)


def test_one_seed_says_nothing_of_the_spread():
    with pytest.raises(ValueError, match="expected two seeds"):
        intervals_over_seeds([Trainings((0.5,), 10)])

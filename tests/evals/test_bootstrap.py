"""Bootstrap intervals against SciPy's, their coverage by simulation, and values of tasks from rows."""

import json

import numpy as np
import scipy.stats

from vlm_jax.evals.bootstrap import REPLICATES, Bootstrap, repetitions
from vlm_jax.evals.metrics import METRICS
from vlm_jax.evals.metrics.text import Exact
from vlm_jax.evals.scores import Scores


def means(groups, values):
    bootstrap = Bootstrap(Exact())
    for group, value in zip(groups, values, strict=True):
        bootstrap.add(str(group), np.array([value, 1.0]))
    return bootstrap.result()["mean"]


def test_the_interval_is_that_of_scipys_percentile_bootstrap():
    values = np.random.default_rng(0).beta(2, 5, 300)
    found = means(range(300), values)
    options = {"method": "percentile", "n_resamples": 4000, "random_state": 1}
    expected = scipy.stats.bootstrap((values,), np.mean, **options).confidence_interval
    assert np.isclose(found["mean"], np.mean(values), atol=1e-12) and found["n"] == 300
    width = expected.high - expected.low
    np.testing.assert_allclose((found["low"], found["high"]), expected, atol=0.06 * width)


def test_a_group_is_resampled_as_a_whole():
    """Ten equal answers to each of 100 pictures say as much as one to each; the interval of 1000 would be a third."""
    values = np.random.default_rng(0).integers(0, 2, 100)
    alone = means(range(100), values)
    together = means(np.repeat(np.arange(100), 10), np.repeat(values, 10))
    np.testing.assert_allclose((together["low"], together["high"]), (alone["low"], alone["high"]))
    assert together["n"] == 1000


def test_intervals_hold_the_mean_95_times_in_100():
    rng, held = np.random.default_rng(0), 0
    for run in range(300):
        truth = rng.uniform(0.2, 0.8)
        found = means([f"{run}, {index}" for index in range(150)], rng.random(150) < truth)
        held += found["low"] <= truth <= found["high"]
    assert 0.92 < held / 300 < 0.98


def test_repetitions_are_a_poisson_number_that_depends_on_the_group_alone():
    counts = np.concatenate([repetitions(f"group {index}") for index in range(200)])
    expected = scipy.stats.poisson(1).pmf(np.arange(5))
    np.testing.assert_allclose(np.bincount(counts, minlength=5)[:5] / counts.size, expected, atol=4e-3)
    repetitions.cache_clear()
    np.testing.assert_array_equal(repetitions("group 0"), counts[:REPLICATES])
    both = np.stack([repetitions(f"group {index}") for index in range(200)])
    assert np.abs(np.corrcoef(both) - np.eye(200)).max() < 0.2


def test_one_answer_has_no_spread_and_none_has_no_interval():
    assert means(["x"], [0.5]) == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 1}
    assert means([], []) == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 0}


def test_scores_by_task_are_those_of_their_metrics():
    rows = [
        row("ocr", "abxd", "abcd", "p"),
        row("ocr", "abcd", "abcd", "q"),
        row("read", "7", "7", "p"),
    ]
    scores = Scores({"read": "characters"})
    for given in rows:
        scores.add(json.loads(json.dumps(given)))
    found = scores.result()
    assert set(found) == {"ocr", "read"} and set(found["read"]) == set(METRICS["characters"].values)
    assert found["ocr"]["mean"]["mean"] == 0.875 and found["ocr"]["character_error_rate"]["mean"] == 1 / 8
    assert (found["ocr"]["mean"]["low"], found["ocr"]["mean"]["high"]) == (0.75, 1.0)
    assert scores.result() == found  # asked twice


def row(task, text, reference, group):
    return {"task": task, "question": "q", "text": text, "references": [reference], "group": group, "is_finished": True}

"""The interface of metrics, for every entry of the table."""

import itertools

import numpy as np
import pytest

from vlm_jax.evals.metrics import BY_TASK, METRICS
from vlm_jax.evals.metrics.metric import Metric, Response

BOX = "<box>(0,0),(500,500)</box>"
TEXTS = (
    "",
    " ",
    "yes",
    "No.",
    "7",
    "7%",
    "A",
    "(B) a cat",
    "a cat\nsat",
    BOX,
    2 * BOX,
    "<table><tr><td>x</td></tr></table>",
)
QUESTION = "what is it?\nA. a cat\nB. a dog"


def responses():
    pairs = itertools.product(TEXTS, TEXTS[2:])
    return [
        Response(text, (reference, "a dog")[: 1 + place % 2], QUESTION, f"{place // 2}", place % 7 > 0)
        for place, (text, reference) in enumerate(pairs)
    ]


every_metric = pytest.mark.parametrize("name", METRICS)


def test_metrics_of_tasks_are_in_the_table():
    assert set(BY_TASK.values()) <= set(METRICS)
    assert all(isinstance(metric, Metric) for metric in METRICS.values())


@every_metric
def test_scores_are_shares(name):
    metric, scores = METRICS[name], [METRICS[name].score(response) for response in responses()]
    assert all(0 <= score <= 1 for score in scores) and len({type(score) for score in scores}) == 1
    assert len(set(scores)) > 1, "no text is better than another"
    statistics = metric.statistics(responses())
    assert statistics.shape == (len(scores), metric.num_statistics) and np.isfinite(statistics).all()


@every_metric
def test_values_are_functions_of_sums(name):
    """Of all answers, of none, and of several resamples at a time as one by one; one answer depends on no other."""
    metric = METRICS[name]
    statistics = metric.statistics(responses())
    sums = np.stack([statistics.sum(axis=0), statistics[::3].sum(axis=0), np.zeros(metric.num_statistics)])
    values = metric.of_sums(sums)
    assert values.shape == (3, len(metric.values)) and np.isfinite(values).all()
    np.testing.assert_allclose(values, [metric.of_sums(one) for one in sums])
    if not metric.needs_all:
        alone = np.concatenate([metric.statistics([response]) for response in responses()])
        np.testing.assert_array_equal(alone, statistics)


@every_metric
def test_numbers_of_no_answers_are_zero(name):
    metric = METRICS[name]
    assert metric.of_sums(metric.statistics([]).sum(axis=0)).tolist() == [0.0] * len(metric.values)


@every_metric
def test_the_mean_score_is_a_value(name):
    metric = METRICS[name]
    values = metric.of_sums(metric.statistics(responses()).sum(axis=0))
    mean = np.mean([metric.score(response) for response in responses()])
    assert np.isclose(values, mean).any()


@every_metric
def test_the_order_of_answers_is_of_no_account(name):
    metric, given = METRICS[name], responses()
    there = metric.statistics(given).sum(axis=0)
    back = metric.statistics(given[::-1]).sum(axis=0)
    np.testing.assert_allclose(metric.of_sums(there), metric.of_sums(back), atol=1e-12)

"""Every metric against its reference implementation, on the 200 answers of each file in `data`; see its README."""

import json
import pathlib

import numpy as np
import pytest

from vlm_jax.evals.metrics import METRICS
from vlm_jax.evals.metrics.metric import Response

DATA = sorted((pathlib.Path(__file__).parent / "data").glob("*.json"))


def read(path):
    """(metric, answers, their scores, {value: of all answers})."""
    given = json.loads(path.read_text())
    responses, scores = [], []
    for number, answer in enumerate(given["answers"]):
        scores.append(answer.pop("score"))
        references = tuple(answer.pop("references"))
        responses.append(Response(references=references, **{"group": str(number), **answer}))
    return METRICS[given["metric"]], responses, scores, given["values"]


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_scores_and_values_are_those_of_the_reference(path):
    metric, responses, scores, values = read(path)
    assert len(responses) == 200
    assert [metric.score(response) for response in responses] == pytest.approx(scores, abs=1e-9)
    sums = metric.statistics(responses).sum(axis=0)
    of_all = dict(zip(metric.values, metric.of_sums(sums), strict=True))
    np.testing.assert_allclose([of_all[name] for name in values], list(values.values()), rtol=1e-6)

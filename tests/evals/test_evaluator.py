"""Rows of answers and their metrics, which need no more than what a file keeps."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.evals import answering
from vlm_jax.evals.evaluators import evaluator_of
from vlm_jax.evals.vqa import Answer

ANSWERS = [
    Answer("a", "read", "read row 1", "7", "7", True, (16,), (16,), ("7",), "page"),
    Answer("b", "read", "read row 2", "5", "7", False, (16, 8), (24,), ("5", "6"), "page", False),
    Answer("c", "count", "count 1", "2", "2", True, references=("2",)),
]

SHARE = {"low": 0.0, "high": 1.0, "n": 4}


def test_metrics_of_rows_read_back_are_those_of_the_answers(monkeypatch):
    config, given = base.get_config(), []
    with config.unlocked():
        config.dtype = "bfloat16"
        config.data.update({"variants": 1, "evaluation_size": 1})
    made = evaluator_of(build(config), config)

    def stand_in(experiment, params, samples, settings):
        given.append((params, settings.batch_size, len(samples)))
        yield from ANSWERS

    monkeypatch.setattr(answering, "answers", stand_in)
    kernel = np.float32(1 + 2**-12)
    rows = list(made.rows({"encoder": {"kernel": jnp.asarray(kernel)}}))
    ((params, *rest),) = given
    assert rest == [200, 4]
    # As an exported folder that is loaded in bfloat16.
    assert params["encoder"]["kernel"].dtype == jnp.bfloat16 and float(params["encoder"]["kernel"]) == 1.0
    assert rows[1] == {
        "sample_id": "b",
        "task": "read",
        "question": "read row 2",
        "reference": "5",
        "text": "7",
        "correct": False,
        "visual_tokens": [16, 8],
        "tokens_by_span": [24],
        "references": ["5", "6"],
        "group": "page",
        "is_finished": False,
        "turns": 1,
    }
    metrics = made.metrics([json.loads(json.dumps(row)) for row in rows])
    assert {task: (entry["mean"], entry["n"]) for task, entry in metrics["accuracy"].items()} == {
        "read": (0.5, 2),
        "count": (1.0, 1),
    }
    assert {task: entry["mean"]["mean"] for task, entry in metrics["scores"].items()} == {"read": 0.5, "count": 1.0}
    assert metrics["num_visual_tokens"] == {"mean": 40 / 3, "max": 16}
    assert metrics["visual_tokens_left"] == metrics["mean_visual_tokens"] == 40 / 3
    assert len(made.lines(metrics)) == 3  # a mean is said once
    said, values = made.lines(metrics), {"f1": metrics["scores"]["read"]["mean"], "recall": {**SHARE, "mean": 0.25}}
    assert made.lines(metrics | {"scores": {"read": values}}) == [
        *said,
        "read, f1: 0.500 (0.500 to 0.500, n=2)",  # of one page
        "read, recall: 0.250 (0.000 to 1.000, n=4)",
    ]
    assert made.lines(metrics)[1] == "read: 0.500 (0.095 to 0.905, n=2)"


def test_an_unknown_metric_is_an_error_of_the_config():
    config = base.get_config()
    with config.unlocked():
        config.evaluation.metrics = ("read=exat",)
    with pytest.raises(ConfigError, match=r"config\.evaluation\.metrics: task 'read': there is no metric 'exat'"):
        evaluator_of(build(config), config)

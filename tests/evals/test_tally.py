"""Counts of answers: numbers by a closed form, and a size that does not grow."""

import pickle
import types

import numpy as np
from scipy.stats import binomtest

from vlm_jax.evals.tally import Tally, shares
from vlm_jax.evals.vqa import Answer
from vlm_jax.types import Drop

# What is read of a model: the depth of its decoder, and the layers that it drops tokens after.
MODEL = types.SimpleNamespace(decoder=types.SimpleNamespace(depth=4, drops=(Drop(1, 4, 0),)))


def tallied(answers):
    tally = Tally()
    for answer in answers:
        tally.add(vars(answer))
    return tally


def test_accuracy_counts_task_by_task():
    results = {"read": [True, True, False, True], "locate": [False, False]}
    answers = [Answer(str(i), task, "", "", "", ok) for task, oks in results.items() for i, ok in enumerate(oks)]
    table = tallied(answers).accuracy()
    assert set(table) == {"read", "locate"}
    for task, oks in results.items():
        interval = binomtest(sum(oks), len(oks)).proportion_ci(0.95, method="wilson")
        assert table[task]["mean"] == sum(oks) / len(oks) and table[task]["n"] == len(oks)
        np.testing.assert_allclose((table[task]["low"], table[task]["high"]), interval, atol=1e-12)
    assert Tally().accuracy() == {} and Tally().realised() == {"mean": 0, "max": 0} and Tally().left(MODEL) == (0, 0)


def test_shares_of_what_is_right_are_averaged():
    """Wilson's interval with the sum of the shares as successes, from its own formula."""
    shares_right = [1.0, 0.75, 0.5, 0.0, 0.25]
    answers = [Answer(str(i), "ocr:2x2", "", "", "", right) for i, right in enumerate(shares_right)]
    found = tallied(answers).accuracy()["ocr:2x2"]
    z, n, p = 1.959963984540054, 5, 0.5
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert found["mean"] == 0.5 and found["n"] == 5
    np.testing.assert_allclose((found["low"], found["high"]), (0.5 - half, 0.5 + half), atol=1e-12)


def test_shares_of_rows_that_can_be_read_once():
    table = shares(
        iter([{"rank": 0}, {"rank": 3}, {"rank": 1}]), {f"@{k}": lambda row, k=k: row["rank"] < k for k in (1, 2, 9)}
    )
    assert {name: (entry["mean"], entry["n"]) for name, entry in table.items()} == {
        "@1": (1 / 3, 3),
        "@2": (2 / 3, 3),
        "@9": (1.0, 3),
    }


def test_visual_tokens_of_images_and_of_layers():
    """Two images of 8 tokens and one of 16, half of which are dropped after the first of four layers; a text alone."""
    answers = [
        Answer("a", "read", "", "", "", True, (8, 8), (16, 8)),
        Answer("b", "read", "", "", "", True, (16,), (16, 8)),
        Answer("c", "read", "", "", "", True),
    ]
    tally = tallied(answers)
    assert tally.realised() == {"mean": 32 / 3, "max": 16}
    last, mean = tally.left(MODEL)
    np.testing.assert_allclose((last, mean), (16 / 3, (32 + 3 * 16) / 3 / 4))


def test_a_tally_of_many_answers_is_as_large_as_one_of_few():
    def size(count):
        return len(
            pickle.dumps(
                tallied(Answer(f"{i}", f"task {i % 3}", "q", "r", "t", True, (4,), (4,)) for i in range(count))
            )
        )

    assert size(3000) < size(30) + 30  # longer numbers

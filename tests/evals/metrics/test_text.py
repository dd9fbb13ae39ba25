"""Equality and edit distance of texts, with counts by hand and error rates of other packages' definitions."""

import numpy as np
import pytest

from vlm_jax.evals.metrics.metric import Response
from vlm_jax.evals.metrics.text import Characters, Exact, character_precision, same_text


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [("7", "7", True), (" 7 ", "7\n", True), ("7 1", "71", False), ("", "7", False), ("A", "a", False)],
)
def test_same_text(answer, reference, right):
    assert same_text(answer, reference) is right


def test_an_answer_without_an_end_is_not_the_reference():
    assert Exact().score(Response("7", ("5", "7"))) is True
    assert Exact().score(Response("7", ("5", "7"), is_finished=False)) is False


@pytest.mark.parametrize(
    ("answer", "reference", "precision"),
    [
        ("sitting", "kitten", 1 - 3 / 7),  # k to s, e to i, and a g: Levenshtein's distance of 3
        ("flaw", "lawn", 1 - 2 / 4),
        ("abcd", "abcd", 1.0),
        (" abcd\n", "abcd", 1.0),
        ("bcd", "abcd", 3 / 4),  # one missing at the front does not shift the rest
        ("abcdabcd", "abcd", 4 / 8),  # as much too much as there is
        ("wxyz", "abcd", 0.0),
        ("", "abcd", 0.0),
        ("", "", 1.0),
        ("e\u0301", "\u00e9", 1.0),  # one character, composed or not
    ],
)
def test_character_precision(answer, reference, precision):
    assert character_precision(answer, reference) == pytest.approx(precision, abs=1e-12)
    assert character_precision(reference, answer) == pytest.approx(precision, abs=1e-12)


def test_error_rates_are_edits_of_all_answers_over_the_length_of_all_references():
    """The example of NIST's SCTK: errors are summed before they are divided, so that long texts count more."""
    responses = [
        Response("the cat sat", ("the cat sat on the mat",)),  # three words and eleven characters are missing
        Response("ab ", ("xyz", "ab")),  # the nearest reference
    ]
    metric = Characters()
    sums = metric.statistics(responses).sum(axis=0)
    expected = [(11 / 22 + 1) / 2, 11 / (22 + 2), 3 / (6 + 1)]
    np.testing.assert_allclose(metric.of_sums(sums), expected, atol=1e-12)

"""Differences of two runs against SciPy's permutation test and bootstrap, McNemar's test, and by enumeration."""

import itertools

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import f1_score

from vlm_jax.evals.paired import DifferentQuestions, differences, told_differences

from ..advice import tried


def row(name, task, text, reference, group=None):
    fields = {"sample_id": name, "task": task, "question": "q", "group": group or name}
    return fields | {"text": text, "references": [reference], "is_finished": True}


def spelled(errors):
    """Answers to the reference of ten letters, with a number of letters wrong."""
    return [row(f"{place}", "ocr", "x" * wrong + "a" * (10 - wrong), "a" * 10) for place, wrong in enumerate(errors)]


def mean_of(ours, theirs):
    (found,) = (one for one in differences(spelled(ours), spelled(theirs), {}) if one.value == "mean")
    return found


def test_few_pairs_have_the_p_value_of_all_permutations():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 8, 10), rng.integers(2, 10, 10)
    expected = scipy.stats.permutation_test(
        (ours, theirs), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    )
    found = mean_of(ours, theirs)
    assert found.p_value == pytest.approx(expected.pvalue) and 0 < found.p_value < 0.5
    assert found.ours - found.theirs == pytest.approx(np.mean(theirs - ours) / 10) and found.n == 10


def test_many_pairs_have_nearly_that_of_scipy_and_its_interval():
    rng = np.random.default_rng(1)
    ours = rng.integers(0, 8, 60)
    theirs = np.clip(ours + rng.integers(-2, 4, 60), 0, 10)
    found, gains = mean_of(ours, theirs), (theirs - ours) / 10
    exact = scipy.stats.permutation_test(
        (gains,), np.mean, permutation_type="samples", n_resamples=9999, random_state=0
    ).pvalue
    assert found.p_value == pytest.approx(exact, abs=0.01)
    options = {"method": "percentile", "n_resamples": 4000, "random_state": 1}
    low, high = scipy.stats.bootstrap((gains,), np.mean, **options).confidence_interval
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.08 * (high - low))


def test_right_and_wrong_answers_have_the_p_value_of_mcnemars_exact_test():
    said = [("7", "7")] * 4 + [("7", "x")] * 7 + [("x", "7")]
    ours, theirs = ([row(f"{i}", "read", pair[run], "7") for i, pair in enumerate(said)] for run in (0, 1))
    (found,) = differences(ours, theirs, {})
    assert found.p_value == pytest.approx(scipy.stats.binomtest(7, 8).pvalue)
    assert told_differences([found])[0].startswith("read, mean: 0.917 against 0.417, difference +0.500 (+0.")


def test_a_value_of_all_answers_is_permuted_as_by_enumeration():
    """F1 of POPE by scikit-learn, over all exchanges of six questions about five pictures."""
    truth, mine, other = (list(text) for text in ("yyynny", "yynnny", "nynyny"))
    names, groups = {"y": "yes", "n": "no"}, "aabcde"
    runs = [
        [row(f"{i}", "pope", names[said[i]], names[truth[i]], groups[i]) for i in range(6)] for said in (mine, other)
    ]
    found = {one.value: one for one in differences(*runs, {})}["f1"]

    def f1(said):
        return f1_score(truth, said, pos_label="y", zero_division=0)

    observed, drawn = abs(f1(mine) - f1(other)), []
    for kept in itertools.product((0, 1), repeat=5):
        swaps = [kept["abcde".index(group)] for group in groups]
        sides = [[pair[swap ^ side] for pair, swap in zip(zip(mine, other), swaps)] for side in (0, 1)]  # noqa: B905
        drawn.append(abs(f1(sides[0]) - f1(sides[1])) >= observed - 1e-12)
    assert found.p_value == pytest.approx(np.mean(drawn)) and found.ours == pytest.approx(f1(mine))


def test_answers_about_one_picture_are_exchanged_together():
    wrong, others = [0, 1, 2, 3, 0, 1], [4, 1, 5, 3, 3, 0]

    def five_times(errors):
        return [one | {"sample_id": f"{one['sample_id']}#{copy}"} for one in spelled(errors) for copy in range(5)]

    alone, together = mean_of(wrong, others), differences(five_times(wrong), five_times(others), {})[0]
    assert (together.p_value, together.low, together.high) == pytest.approx((alone.p_value, alone.low, alone.high))
    assert together.n == 30


def test_runs_that_are_the_same_do_not_differ():
    for count in (5, 50):
        found = mean_of([3] * count, [3] * count)
        assert (found.low, found.high, found.p_value) == (0.0, 0.0, 1.0)


def test_runs_with_other_questions_are_not_compared():
    rows = spelled([1, 2])
    for other in (rows[:1], [rows[0], rows[1] | {"group": "z"}], [rows[0], rows[1] | {"question": "r"}]):
        with pytest.raises(
            DifferentQuestions, match=tried("use evaluations of the same data, with the same seed and turns")
        ):
            differences(rows, other, {})
    assert len(differences(rows, rows[::-1], {})) == 3

"""Totals of MME's subtasks against those of its evaluation tool, on drawn answers."""

import json
import pathlib

import numpy as np
import pytest

from vlm_jax.evals.bootstrap import repetitions
from vlm_jax.evals.evaluator import told_scores
from vlm_jax.evals.scores import Scores

# 182 drawn answers to pairs of questions, with what calculation.py prints of them, as in zjunlp/Deco at a3ccc15.
GIVEN = json.loads((pathlib.Path(__file__).parent / "mme_totals.json").read_text())


def rows(kind="mme", tasks=GIVEN["scores"]):
    """One row for each answer, the two about a picture far from each other."""
    return [
        {"task": f"{kind}:{task}", "text": text, "references": [reference], "group": group, "question": ""}
        | {"is_finished": True}
        for place in (0, 1)
        for task in tasks
        for group, reference, text in GIVEN["answers"][task][place::2]
    ]


def scores(given, chosen=()):
    found = Scores(dict(chosen))
    for row in given:
        found.add(row)
    return found.result()


def test_scores_and_totals_are_those_of_the_tool():
    found = scores(rows())
    for task, score in GIVEN["scores"].items():
        assert found[f"mme:{task}"]["score"]["mean"] == pytest.approx(score)
    assert {name: value["mean"] for name, value in found["mme"].items()} == pytest.approx(GIVEN["totals"])
    counts = {name: value["n"] for name, value in found["mme"].items()}
    assert sum(counts.values()) == len(rows()) and counts["cognition"] == sum(
        len(GIVEN["answers"][task]) for task in list(GIVEN["answers"])[10:]
    )
    assert f"mme, perception: {GIVEN['totals']['perception']:.3f} (" in "\n".join(told_scores(found))


def test_a_totals_interval_is_that_of_replicates_of_all_its_subtasks():
    """By the definition of MME's score, picture by picture, in each replicate."""
    drawn = 0.0
    for task in list(GIVEN["answers"])[10:]:
        asked = GIVEN["answers"][task]
        pictures = dict.fromkeys(group for group, *_ in asked)
        right = {
            name: sum(
                text.lower()[:4].startswith(reference.lower()) for group, reference, text in asked if group == name
            )
            for name in pictures
        }
        times = np.stack([repetitions(name) for name in pictures], axis=1)
        of_each = np.array([[count / 2 + (count == 2)] for count in right.values()])
        with np.errstate(invalid="ignore"):
            drawn = drawn + 100 * (times @ of_each)[:, 0] / times.sum(axis=1)
    expected = np.nanquantile(drawn, (0.025, 0.975))
    found = scores(rows())["mme"]["cognition"]
    np.testing.assert_allclose((found["low"], found["high"]), expected)


def test_a_total_needs_all_its_subtasks():
    tasks = list(GIVEN["scores"])
    assert set(scores(rows(tasks=tasks[1:]))["mme"]) == {"cognition"}
    assert "mme" not in scores(rows(tasks=tasks[1:-1]))
    said = told_scores({"mme": {"cognition": {"mean": 1.0, "low": 0.0, "high": 2.0, "n": 3}}})
    assert said == ["mme, cognition: 1.000 (0.000 to 2.000, n=3)"]


def test_totals_are_of_tasks_of_the_same_kind_that_have_the_metric():
    found = scores(rows("mine"), {"mine": "mme"})
    assert {name: value["mean"] for name, value in found["mine"].items()} == pytest.approx(GIVEN["totals"])
    assert "mine" not in scores(rows("mine"))  # another metric

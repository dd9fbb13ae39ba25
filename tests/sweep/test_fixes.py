"""What messages of sweeps and evaluations advise works: a fault, the message, and what the fix gives."""

import re

import pytest
from ml_collections import ConfigDict

import vlm_jax
from tests.train.conftest import tiny_config
from vlm_jax.config import ConfigError
from vlm_jax.sweep import points as points_module
from vlm_jax.sweep.costs import Costs
from vlm_jax.sweep.hard import with_hard_questions
from vlm_jax.sweep.points import list_points
from vlm_jax.sweep.release_points import list_release_points

from ..advice import tried
from .test_untrained import sweep_config

TRAINED = {"budgets": (2,), "reducer": {"kind": "random"}}
RANDOM = {**TRAINED, "schedule": ()}
ALONE = {"sweep": {}, "candidates.other": TRAINED}  # without shared stages
QUERIES = {"budgets": (1, 4), "connector": {"kind": "resampler", "num_heads": 2}}
NESTED = {"budgets": (1, 4), "connector": {"kind": "matryoshka", "budgets": (1, 4), "inner": {"kind": "pool"}}}
POOL = {"budgets": (1,), "connector": {"kind": "pool"}}
WIDE = {"encoder": {**tiny_config().encoder.to_dict(), "mlp_dim": 48}}
OF_QUERIES = {"base.connector": QUERIES["connector"], "base.token_budget": 4, "candidates.other": {"budgets": (4,)}}
OTHER_SHAPE = tried("its {connector} has other shapes than that of the shared stages; give the candidate a section {}")
OTHER_ENCODER = tried("its {encoder} has other shapes than that of the shared stages, which every candidate has; take")

# (fault, message, the fix as further changes, the points then); `one` is a candidate
FIXES = [
    (
        {"base.evaluation.every": 2, "candidates.one": RANDOM},
        tried("config.base.evaluation.every: points are evaluated when they are trained; set it to None in a sweep"),
        {"base.evaluation.every": None},
        ["one@2"],
    ),
    (
        {"candidates.one": {**RANDOM, "trained_at": 2}},
        tried("{config.candidates.one}.trained_at: the candidate trains nothing; remove it"),
        {"candidates.one": RANDOM},
        ["one@2"],
    ),
    (
        {"candidates.one": {**POOL, "schedule": ()}},
        tried("its {connector} would be drawn and never trained; give it a schedule, or take these parts from config"),
        {"candidates.one": {**POOL, "schedule": ("answering",)}},
        ["one@1"],
    ),
    (
        {"candidates.one": {**POOL, "schedule": ()}},
        tried("its {connector} would be drawn and never trained; give it a schedule, or take these parts from config"),
        {"candidates.one": RANDOM},
        ["one@2"],
    ),
    (
        {**OF_QUERIES, "candidates.one": {"budgets": (2,)}},
        OTHER_SHAPE,
        {"candidates.one": {"budgets": (2,), "connector": QUERIES["connector"], "schedule": ("answering",)}},
        ["one@2"],
    ),
    (
        {"candidates.one": {**POOL, "schedule": ("answering",), **WIDE}},
        OTHER_ENCODER,
        {"candidates.one": {**POOL, "schedule": ("answering",)}},
        ["one@1"],
    ),
    ({"candidates.one": {**POOL, **WIDE}}, OTHER_ENCODER, ALONE, ["one@1"]),
    (
        {**ALONE, "candidates.one": {**QUERIES, "trained_at": 4}},
        tried("choose a connector that nests its budgets, such as matryoshka, or train each"),
        {"candidates.one": {**NESTED, "trained_at": 4}},
        ["one@1", "one@4"],
    ),
    (
        {**ALONE, "candidates.one": {**QUERIES, "trained_at": 4}},
        tried("choose a connector that nests its budgets, such as matryoshka, or train each"),
        {"candidates.one": QUERIES},
        ["one@1", "one@4"],
    ),
]


@pytest.fixture(autouse=True)
def uncounted(monkeypatch):
    """Points without costs, which take most of the time."""
    monkeypatch.setattr(points_module, "costs", lambda experiment, sample: Costs(4, 0.0, {}, {}))


def changed(changes):
    config = ConfigDict(
        {"base": tiny_config(), "candidates": {"other": RANDOM}, "sweep": {"shared": ("seeing", "answering")}}
    )
    config.base.connector.kind, config.base.token_budget = "mlp", 16
    for path, value in changes.items():
        *parents, key = path.split(".")
        section = config
        for name in parents:
            section = section[name]
        with section.unlocked(), section.ignore_type():
            section[key] = ConfigDict(value) if isinstance(value, dict) else value
    return config


@pytest.mark.parametrize(("fault", "message", "fix", "labels"), FIXES, ids=[message for _, message, _, _ in FIXES])
def test_advice_on_a_sweep_that_is_followed_helps(fault, message, fix, labels):
    with pytest.raises(ConfigError, match=message):
        list_points(changed(fault))
    found = [point.label for point in list_points(changed({**fault, **fix}))]
    assert [label for label in found if label.startswith("one")] == labels


def test_connectors_are_compared_by_a_sweep_where_an_evaluation_refuses_them(released):
    release, questions, _ = released
    points, refused = list_release_points(vlm_jax.from_pretrained(release).system, ("pool",), (4,))
    assert points == []
    assert re.search(tried("or compare trained connectors with vlm_jax.cli.sweep"), refused[0].reason)
    (questions.parent / "evaluation.jsonl").write_text(questions.read_text())
    config = sweep_config(release, questions)
    del config.candidates["none"], config.candidates["fastv"]
    assert [point.label for point in list_points(config)] == ["pool@4"]


def test_answers_to_other_questions_need_another_workdir():
    results = [{"connector": name, "token_budget": 4, "seed": 0, "label": f"{name}@4"} for name in ("small", "pool")]
    old = {"small@4": [answer("0"), answer("1")], "pool@4": [answer("0"), answer("2")]}
    with pytest.raises(ValueError, match=tried("differ in their questions: {1} and {2}; use another --workdir")):
        with_hard_questions(results, "small", old.__getitem__)
    new = {label: [answer("0"), answer("2")] for label in old}
    scored = with_hard_questions(results, "small", new.__getitem__)
    assert [result["hard_accuracy"]["vqa"]["n"] for result in scored] == [2, 2]


def answer(name):
    return {"sample_id": name, "correct": False, "task": "vqa"}

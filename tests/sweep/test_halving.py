"""Successive halving: where the rungs are, which loss a point has there, and which points go on."""

import json
import pickle
import sys

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from vlm_jax.config import ConfigError
from vlm_jax.sweep.executor import Stopped
from vlm_jax.sweep.halving import Halving, HalvingSettings, goes_on, rung_loss, steps_done, stopped_at, told
from vlm_jax.sweep.points import list_points
from vlm_jax.sweep.run import Sweep

from ..advice import tried
from .test_run import new_console, tiny_sweep


def test_rungs_are_powers_of_the_factor_before_the_last_step():
    settings = HalvingSettings(first_steps=10, factor=3)
    assert list(settings.rungs(271)) == [10, 30, 90, 270]
    assert list(settings.rungs(270)) == [10, 30, 90] and list(settings.rungs(10)) == []


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("rung", [1, 3, 6])
def test_the_lowest_losses_go_on(factor, rung):
    """Those not above the quantile 1 / factor of the losses that were there before, by NumPy's percentile."""
    random = np.random.default_rng(factor)
    settings, decisions = HalvingSettings(first_steps=5, factor=factor), []
    step = list(settings.rungs(10**9))[rung]
    for count in (1, 2, 3, 7, 30):
        others = random.normal(3, 1, count).tolist()
        limit = np.percentile(others, 100 / factor)
        for loss in (limit - 1e-3, limit + 1e-3, *random.normal(3, 1, 5)):
            decisions.append(goes_on(float(loss), others, step, settings))
            assert decisions[-1] == (loss <= limit), (loss, others)
    assert len(set(decisions)) == 2
    assert goes_on(9.0, [], step, settings)  # the first one


def write(folder, losses):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": number, "loss": loss}) + "\n" for number, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_a_rungs_loss_is_the_mean_of_the_last_quarter_of_its_steps(tmp_path):
    folder = epath.Path(tmp_path)
    assert steps_done(folder) == 0
    write(folder, [float(number) for number in range(1, 21)])
    assert rung_loss(folder, 16) == np.mean([13, 14, 15, 16]) and rung_loss(folder, 3) == 3
    assert steps_done(folder) == 20
    write(folder, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, float("nan"), 8.0])
    assert rung_loss(folder, 8) == 8.0 and rung_loss(folder, 7) is None


def halving(tmp_path, name, others, **settings):
    folder = epath.Path(tmp_path)
    return Halving(HalvingSettings(**settings), folder / name, tuple(folder / other for other in others))


def test_a_training_is_stopped_at_a_rung_once_and_for_all(tmp_path):
    given = {"first_steps": 2, "factor": 2}
    one, two = halving(tmp_path, "one", ["two"], **given), halving(tmp_path, "two", ["one"], **given)
    told_steps = []
    watched = one.watched(lambda step, steps, metrics: told_steps.append(step))
    for step in range(1, 10):
        write(one.folder, [5.0] * step)
        watched(step, 9, {})
    assert told_steps == list(range(1, 10)) and stopped_at(one.folder) is None
    assert [line["step"] for line in lines(one)] == [2, 4, 8]

    write(two.folder, [6.0, 4.0, 5.0, 6.0])
    watched = pickle.loads(pickle.dumps(two)).watched(lambda *given: None)
    with pytest.raises(Stopped, match="at step 4 with a loss of 6, compared with 1 others"):
        watched(4, 9, {})  # both rungs since the last call
    assert [(line["loss"], line["stopped"]) for line in lines(two)] == [(4.0, False), (6.0, True)]
    before = lines(two)
    write(two.folder, [0.0, 0.0, 0.0])
    with pytest.raises(Stopped, match="at step 4"):  # another process that takes it up
        two.check(3, 9)
    assert lines(two) == before
    one.check(9, 9)  # decisions stand, whatever came to the rung since


def test_a_rung_that_a_killed_process_passed_is_decided_by_the_next(tmp_path):
    one, two = halving(tmp_path, "one", [], first_steps=3), halving(tmp_path, "two", ["one"], first_steps=3)
    write(one.folder, [1.0] * 5)
    write(two.folder, [2.0] * 5)
    one.check(steps_done(one.folder), 9)
    two.check(2, 9)
    assert not (two.folder / "rungs.jsonl").exists()
    with pytest.raises(Stopped, match="at step 3"):
        two.check(steps_done(two.folder), 9)


def test_a_training_without_a_finite_loss_is_stopped_and_compared_with_none(tmp_path):
    one, two = halving(tmp_path, "one", [], first_steps=2), halving(tmp_path, "two", ["one"], first_steps=2)
    write(one.folder, [float("nan")] * 2)
    with pytest.raises(Stopped, match="at step 2, where no loss was finite"):
        one.check(2, 9)
    write(two.folder, [9.0] * 2)
    two.check(2, 9)
    assert lines(two) == [{"step": 2, "loss": 9.0, "compared_with": 0, "stopped": False}]


def lines(one):
    return [json.loads(line) for line in (one.folder / "rungs.jsonl").read_text().splitlines()]


def test_where_a_training_was_stopped_is_told():
    line = {"step": 8, "loss": 2.34567, "compared_with": 3}
    assert told(line) == "at step 8 with a loss of 2.346, compared with 3 others"


@pytest.fixture
def config():
    config = tiny_sweep().unlock()
    config.base.unlock()
    config.sweep.halving = ConfigDict({"first_steps": 2})
    return config


def test_trainings_are_compared_with_those_for_as_many_tokens(config, tmp_path):
    pool, random = config.candidates.pool.to_dict(), config.candidates.random.to_dict()
    nested = {"connector": {"kind": "matryoshka", "budgets": (1, 2), "inner": {"kind": "pool"}}}
    config.candidates = ConfigDict(
        {
            "pool": pool | {"budgets": (1, 2)},
            "random": random,
            "nested": {"budgets": (1, 2), "trained_at": 2, **nested},
        }
    )
    config.sweep.seeds = (0, 5)
    sweep = Sweep(config, tmp_path / "sweep", config_path="c.py", console=new_console())
    compared = {}
    for point in sweep.points:
        one = sweep._halving(point)
        assert one is not None and one.folder.name == point.trained_as
        compared[point.label] = {folder.name for folder in one.others}
    assert compared["pool@1"] == {"pool@1#5"}
    every = {f"{name}@2{seed}" for name in ("pool", "random", "nested") for seed in ("", "#5")}
    for label in ("pool@2", "random@2", "nested@1", "nested@2"):
        own = "nested@2" if label == "nested@1" else label
        assert compared[label] == every - {own}


def test_losses_of_other_objectives_are_not_compared(config):
    config.base.stages.text = ConfigDict(config.base.stages.answering.to_dict() | {"objective": "read_cells"})
    config.candidates.pool.schedule = ("text",)
    with pytest.raises(ConfigError, match=tried("objectives are {} and {}; give them the same, or set it to None")):
        list_points(config)
    config.sweep.halving = None
    config.candidates.pool.schedule = ("answering",)
    assert list_points(config)
    config.sweep.halving = ConfigDict({"first_steps": 2})
    assert list_points(config)


def test_ray_tune_is_needed_only_for_halving(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.tune.schedulers", None)
    with pytest.raises(ConfigError, match=tried("pip install 'vlm_jax[ray]', or set it to None")):
        list_points(config)
    config.sweep.halving = None
    assert list_points(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first_steps": 0}, "first_steps: expected at least 1, got 0"),
        ({"first_steps": 2, "factor": 1}, "factor: expected at least 2 and at most 100, got 1"),
        ({}, "first_steps: missing, and it has no default"),
        ({"first_steps": 2, "fator": 3}, "fator: unknown or unused key; did you mean 'factor'"),
    ],
)
def test_bad_settings_are_refused(config, settings, message):
    config.sweep.halving = ConfigDict(settings)
    with pytest.raises(ConfigError, match=rf"config\.sweep\.halving\.{message}"):
        list_points(config)

"""Planned sweeps: their product, their files, and the frontier of measured accuracy against predicted chip time."""

import dataclasses
import json

import pytest
from etils import epath

from configs import digits
from vlm_jax.budget import InfeasibleBudget
from vlm_jax.config import ConfigError
from vlm_jax.planner.memory import Memory
from vlm_jax.planner.plan import Plan
from vlm_jax.planner.predict import Estimate
from vlm_jax.planner.request import Request
from vlm_jax.sweep.frontier import combine_seeds, front_of
from vlm_jax.sweep.planned import joined, planned_points, write_joined_report, write_plans

MEMORY = Memory(1, 0, 1, 0, 2, 16, True)


def plan_of(seconds: float) -> Plan:
    time = Estimate(seconds, 0.8 * seconds, 1.25 * seconds, *[seconds] * 5, 0.5, 0.0)
    given = dict.fromkeys([field.name for field in dataclasses.fields(Plan)])
    given |= {"stage": "train", "rows": 8, "tokens": 64, "details": {}, "topology": "v5e:2x2", "chip": "v5e"}
    given |= {"num_devices": 4, "mesh": {}, "memory": MEMORY, "parameters": (), "temporaries": (), "flops": 1.0}
    given |= {"model_flops": 1.0, "step_time": time, "refused": "", "compile_seconds": 1.0, "assumptions": ()}
    return Plan(**{**given, "versions": {}})


def make(request) -> Plan:
    budget = request.config.token_budget
    if budget == 3:
        raise InfeasibleBudget("config.token_budget: 3 is impossible; 4 is possible")
    return plan_of(1e-3 * budget)


@pytest.fixture(scope="module")
def points():
    product = {"budgets": [4, 3, 16], "connectors": ["released", "pool"], "topologies": ["v5e:2x2", "v5p:2x2x1"]}
    return list(planned_points(Request(digits.get_config(), "v5e:2x2"), make, **product))


def result(connector, budget, accuracy):
    share = {"mean": accuracy, "low": accuracy, "high": accuracy, "n": 100}
    made = {"connector": connector, "token_budget": budget, "num_visual_tokens": budget, "step_seconds": None}
    made |= {"realised_visual_tokens": {"mean": budget}, "accuracy": {"vqa": share}, "num_params": {"all": 1}}
    return made | {"flops": {"all": 1}, "peak_bytes": None, "seed": 0, "command": "sweep"}


def test_a_sweep_is_the_product_and_says_why_a_point_is_missing(points):
    assert len(points) == 12 and len({(one.label, one.topology) for one in points}) == 12
    refused = [one for one in points if one.plan is None]
    assert {one.token_budget for one in refused} == {3} and all("4 is possible" in one.refused for one in refused)


def test_its_files_have_every_point_and_a_figure(points, tmp_path):
    plans, figure = write_plans(points, epath.Path(tmp_path / "sweep"))
    found = json.loads(plans.read_text())
    assert [one["plan"] is None for one in found] == [one.plan is None for one in points]
    assert found[0]["plan"]["step_time"]["seconds"] == pytest.approx(4e-3)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_joined_results_have_the_chip_time_of_an_example(points, tmp_path):
    """Seconds of a step times four chips, over eight rows; the front has no point that another one beats."""
    results = [result("pool", 4, 0.5), result("pool", 16, 0.9), result("other", 4, 0.1)]
    found = joined(results, points, "v5e:2x2")
    assert [one["chip_seconds"] for one in found] == pytest.approx([4e-3 * 4 / 8, 16e-3 * 4 / 8])
    assert front_of(combine_seeds(found), "vqa", "chip_seconds") == [0, 1]
    page = write_joined_report(found, epath.Path(tmp_path), title="A < B").read_text()
    assert "Predicted chip time of an example" in page and "A &lt; B" in page


def test_a_release_as_it_is_has_the_plan_of_its_own_connector(tmp_path):
    """As `cli.evaluate` writes it: `none`, without a budget."""
    product = {"budgets": [None], "connectors": ["released"], "topologies": ["v5e:2x2"]}
    request = Request(digits.get_config(), "v5e:2x2")
    (point,) = planned_points(request, lambda _: plan_of(1e-3), **product)
    given = result("none", None, 0.5) | {"num_visual_tokens": 9, "realised_visual_tokens": {"mean": 9, "max": 9}}
    (found,) = joined([given], [point], "v5e:2x2")
    assert found["chip_seconds"] == pytest.approx(1e-3 * 4 / 8)
    assert "none@released" in write_joined_report([found], epath.Path(tmp_path), title="x").read_text()


def test_results_without_a_plan_are_named(points):
    with pytest.raises(ConfigError, match=r"planned pool@16, pool@4, .*got other@4"):
        joined([result("other", 4, 0.1)], points, "v5e:2x2")

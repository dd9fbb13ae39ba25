"""The sweep of every learned connector: none is left out, and a matryoshka is trained once."""

import pytest

from configs.sweeps import digits_all_connectors
from vlm_jax.build import PARTS, Experiment
from vlm_jax.connectors import CONNECTORS
from vlm_jax.sweep import points as points_module
from vlm_jax.sweep.costs import Costs, costs
from vlm_jax.sweep.points import list_points

# Kinds that are not candidates of their own: that of the shared system, one that joins the features of two encoders,
# and one that wraps candidates.
ELSEWHERE = {"mlp", "hybrid_mlp", "matryoshka"}


@pytest.fixture(scope="module")
def points():
    """Points of every candidate, without FLOPs: all budgets of one matryoshka, and of the others the largest."""
    config = digits_all_connectors.get_config()
    with config.unlocked():
        config.sweep.seeds = (0,)
        config.base.encoder.remat = config.base.decoder.remat = "none"  # tracing is faster
        for name in config.candidates:
            if name != "matryoshka_resampler":
                config.candidates[name].budgets = config.candidates[name].budgets[-1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(points_module, "costs", uncounted)
        return list_points(config)


def uncounted(experiment, sample):
    return Costs(experiment.budget.left, 0.0, {}, {})


def test_every_connector_that_takes_one_grid_is_a_candidate():
    missing = set(CONNECTORS) - set(digits_all_connectors.CONNECTORS) - ELSEWHERE
    assert not missing, f"add {missing} to CONNECTORS in configs/sweeps/digits_all_connectors.py"


def test_every_budget_is_feasible():
    candidates = digits_all_connectors.get_config().candidates
    assert candidates.mlp.budgets == (64,)  # every patch
    for candidate in [candidate for name, candidate in candidates.items() if name != "mlp"]:
        settings = candidate.connector.get("inner", candidate.connector).to_dict()
        kind = CONNECTORS[settings.pop("kind")]
        for budget in candidate.budgets:
            assert kind(features=8, **settings, **kind.for_budget(budget, (8, 8))).num_tokens((8, 8)) == budget


def test_every_point_meets_its_budget(points):
    for point in points:
        assert point.costs.num_visual_tokens == point.config.token_budget
        assert point.label == f"{point.connector}@{point.config.token_budget}"


def test_a_matryoshka_has_one_training_and_every_other_point_its_own(points):
    for point in points:
        if point.connector == "mlp":
            assert point.trained_as == "untrained" and not point.config.schedule  # the shared stages train it
        elif not point.connector.startswith("matryoshka"):
            assert point.trained_as == point.label and point.training[0] is point.config
        else:
            assert point.trained_as == f"{point.connector}@16" and point.training[0].token_budget == 16
    nested = {point.label: point.experiment for point in points if point.connector == "matryoshka_resampler"}
    assert len(nested) == 5
    flops = [costs(nested[f"matryoshka_resampler@{budget}"]).flops["prefill"] for budget in (1, 4, 16)]
    assert flops == sorted(set(flops))  # fewer tokens cost less: they are not masked, but left out


@pytest.mark.parametrize(
    ("arg", "labels"),
    [
        ("small", {"mlp@64"} | {f"pool@{n}" for n in (1, 4, 16)} | {f"matryoshka_pool@{n}" for n in (1, 2, 4, 8, 16)}),
        ("smoke", {"mlp@64"} | {f"{name}@{n}" for name in ("concat", "matryoshka_resampler") for n in (1, 4)}),
    ],
)
def test_smaller_sweeps(arg, labels, monkeypatch):
    """Every point is built and meets its budget; costs and shapes, which are traced, are those of `points`."""
    monkeypatch.setattr(points_module, "costs", uncounted)
    monkeypatch.setattr(Experiment, "boxed_shapes", lambda experiment: dict.fromkeys(PARTS))
    config = digits_all_connectors.get_config(arg)
    with config.unlocked():
        config.sweep.seeds = (0,)
    assert {point.label for point in list_points(config)} == labels

"""Which points of a sweep are drawn, their values of config keys, and what is refused."""

import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import stats

from vlm_jax.config import ConfigError, config_hash
from vlm_jax.sweep.points import list_points
from vlm_jax.sweep.search import Place, RandomSettings, RangeSettings, places

from ..advice import tried
from .test_run import tiny_sweep

CANDIDATES = ConfigDict({"a": {"budgets": (1, 4)}, "b": {"budgets": (None,)}})
GRID = [("a", 0, 1), ("a", 0, 4), ("a", 7, 1), ("a", 7, 4), ("b", 0, None), ("b", 7, None)]
RATE = RangeSettings("optimizer.weight_decay", low=1e-4, high=1e-1, log=True)


def found(random, candidates=CANDIDATES):
    return [(one.candidate, one.seed, one.budget) for one in places(candidates, (0, 7), random)]


def test_without_a_draw_all_points_are_run():
    assert found(None) == GRID


def test_points_of_the_grid_are_drawn_once_each_and_the_first_stay():
    drawn = [found(RandomSettings(count, seed=3)) for count in range(1, 7)]
    for fewer, more in itertools.pairwise(drawn):
        assert set(fewer) < set(more) and len(more) == len(set(more))
        assert more == [one for one in GRID if one in more]  # in the order of the grid
    assert drawn[-1] == GRID
    counts = {one: 0 for one in GRID}
    for seed in range(600):
        counts[found(RandomSettings(1, seed=seed))[0]] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_more_points_than_the_grid_has_are_refused():
    with pytest.raises(ConfigError, match="num_points: expected at most 6, the points of the grid, got 7"):
        found(RandomSettings(7))


def test_values_are_uniform_between_their_bounds():
    """Kolmogorov and Smirnov's test against SciPy's distributions."""
    linear, generator = RangeSettings("x", low=-2.0, high=6.0), np.random.default_rng(0)
    drawn = [linear.draw(generator) for _ in range(2000)]
    assert stats.kstest(drawn, stats.uniform(-2, 8).cdf).pvalue > 1e-3
    drawn = [RATE.draw(generator) for _ in range(2000)]
    assert stats.kstest(drawn, stats.loguniform(1e-4, 1e-1).cdf).pvalue > 1e-3
    assert all(value == float(f"{value:.4g}") for value in drawn)
    narrow = RangeSettings("x", low=1.00001, high=1.00002)  # no number between has four digits
    assert all(1.00001 <= narrow.draw(generator) <= 1.00002 for _ in range(20))
    choices = [RangeSettings("x", choices=("p", "q", 3)).draw(generator) for _ in range(900)]
    assert stats.chisquare([choices.count(one) for one in ("p", "q", 3)]).pvalue > 1e-3


def test_points_with_drawn_values_are_numbered_and_the_first_stay():
    few, more = (places(CANDIDATES, (0,), RandomSettings(count, ranges={"decay": RATE})) for count in (3, 8))
    assert more[:3] == few and [one.number for one in more] == list(range(8))
    assert len({one.values["decay"] for one in more}) == 8
    assert Place("a", 0, 1, 5).name == "a~5" and Place("a", 0, 1).name == "a"


def test_points_that_would_repeat_are_refused():
    choices = RandomSettings(7, ranges={"x": RangeSettings("x", choices=(1, 2))})
    with pytest.raises(ConfigError, match=tried("only {} that differ; lower it, or widen the ranges")):
        places(CANDIDATES, (0,), choices)
    assert len(places(CANDIDATES, (0,), RandomSettings(6, ranges=choices.ranges))) == 6
    wider = {"x": RangeSettings("x", choices=(1, 2, 3))}
    assert len(places(CANDIDATES, (0,), RandomSettings(7, ranges=wider))) == 7


@pytest.fixture
def config():
    config = tiny_sweep().unlock()
    config.base.unlock()
    config.sweep.random = ConfigDict({"num_points": 4, "ranges": {"decay": {"key": "optimizer.weight_decay"}}})
    config.sweep.random.ranges.decay.update({"low": 1e-4, "high": 1e-1, "log": True})
    return config


def test_drawn_values_are_in_the_configs_of_their_points_alone(config):
    points = list_points(config)
    assert sorted(point.connector.partition("~")[2] for point in points) == ["0", "1", "2", "3"]
    for point in points:
        assert point.label == f"{point.connector}@{1 if point.connector.startswith('pool') else 2}"
        decay = point.config.optimizer.weight_decay
        assert point.drawn == {"optimizer.weight_decay": decay} and 1e-4 <= decay <= 1e-1
    assert len({config_hash(point.config) for point in points}) == 4
    assert config.base.optimizer.weight_decay == 0.05


def test_a_range_of_a_stage_is_for_the_points_that_have_it(config):
    config.base.stages.other = ConfigDict(config.base.stages.answering.to_dict())
    config.candidates.pool.schedule = ("other",)
    config.sweep.random.ranges.decay = ConfigDict({"key": "stages.other.learning_rates.connector", "choices": (0.5,)})
    config.sweep.random.num_points = 2
    points = list_points(config)
    assert {point.connector[:4] for point in points} == {"pool", "rand"}
    for point in points:
        given = {"stages.other.learning_rates.connector": 0.5} if point.connector.startswith("pool") else {}
        assert point.drawn == given
        assert not given or point.config.stages.other.learning_rates.connector == 0.5
    config.sweep.random.num_points = 3  # of which two would be the same
    with pytest.raises(ConfigError, match="3 points are not found, only 2 that differ"):
        list_points(config)


def test_a_key_that_is_left_at_its_default_can_be_drawn(config):
    config.sweep.random.num_points = 2
    config.sweep.random.ranges.decay = ConfigDict({"key": "optimizer.b1", "choices": (0.5,)})
    assert {point.config.optimizer.b1 for point in list_points(config)} == {0.5}


def test_drawn_values_are_checked_before_anything_is_built(config):
    config.sweep.random.num_points = 2
    config.sweep.random.ranges.decay = ConfigDict({"key": "optimizer.weight_decay", "choices": ("x",)})
    message = r"candidate '\w+~0' at \d tokens: config\.optimizer\.weight_decay: expected float, got 'x'"
    with pytest.raises(ConfigError, match=message):
        list_points(config)
    config.sweep.random.ranges.decay.choices = (-1.0,)
    refused = {}
    with pytest.raises(ConfigError, match=r"weight_decay: expected at least 0, got -1\.0"):
        list_points(config, refused=refused)
    config.sweep.random.ranges.decay = ConfigDict({"key": "optimizer.weight_decya", "choices": (0.1,)})
    with pytest.raises(ConfigError, match=r"config\.optimizer\.weight_decya: unknown.*'weight_decay'"):
        list_points(config)


def test_choices_have_no_bounds(config):
    decay = config.sweep.random.ranges.decay
    decay.choices = (0.1, 0.2)
    with pytest.raises(ConfigError, match=tried("low, high and log are of numbers between bounds; remove them")):
        list_points(config)
    for key in ("low", "high", "log"):
        del decay[key]
    assert {point.config.optimizer.weight_decay for point in list_points(config)} == {0.1, 0.2}


@pytest.mark.parametrize("key", ["token_budget", "seed", "schedule"])
def test_what_the_sweep_sets_is_not_drawn(config, key):
    config.sweep.random.ranges.decay.key = key
    with pytest.raises(ConfigError, match=tried("is set by the sweep itself; use config.sweep.seeds, or budgets and")):
        list_points(config)
    config.sweep.random = ConfigDict({"num_points": 2})
    config.sweep.seeds, config.candidates.pool.budgets = (3, 4), (1, 4)
    assert len(list_points(config)) == 2


BOUNDS = {"low": 2.0, "high": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 1.0}, ": expected low and high, or choices, got low=1.0, high=None"),
        (BOUNDS, r"\.low: expected a number below high, 1\.0, got 2\.0"),
        ({**BOUNDS, "low": 0.0, "log": True}, r"\.low: expected a number above 0 and below high, 1\.0, got 0\.0"),
        ({**BOUNDS, "low": float("nan")}, r"\.low: expected a finite number, or None, got nan"),
        ({"lwo": 1.0}, r"\.lwo: unknown or unused key; did you mean 'low'"),
    ],
)
def test_bad_bounds_are_refused(config, settings, message):
    config.sweep.random.ranges.decay = ConfigDict({"key": "optimizer.weight_decay", **settings})
    with pytest.raises(ConfigError, match=rf"config\.sweep\.random\.ranges\.decay{message}"):
        list_points(config)


def test_a_range_of_a_section_that_no_candidate_has_is_refused(config):
    config.sweep.random.ranges.decay.key = "optimiser.weight_decay"
    with pytest.raises(ConfigError, match=r"ranges\.decay\.key: no candidate's own config has .*mean 'optimizer'"):
        list_points(config)
    config.sweep.random.ranges.decay.key = "stages.seeing.batch_size"  # a shared stage
    with pytest.raises(ConfigError, match=r"no candidate's own config has the section of 'stages\.seeing\.batch_size'"):
        list_points(config)

"""A sweep of two tiny points: what is listed, run, kept, resumed and written."""

import dataclasses
import io
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import rich.console
from etils import epath
from ml_collections import ConfigDict

from tests.train.conftest import tiny_config
from vlm_jax.budget import InfeasibleBudget
from vlm_jax.build import build
from vlm_jax.checkpoints.runs import read_parts
from vlm_jax.config import ConfigError, config_hash, plain
from vlm_jax.sharding.rules import placed
from vlm_jax.sweep import point_run
from vlm_jax.sweep import run as sweep_run
from vlm_jax.sweep.frontier import combine_seeds
from vlm_jax.sweep.points import list_points
from vlm_jax.sweep.run import Sweep, Timing
from vlm_jax.train.workdir import each_line

from ..advice import tried

PATCHES, WIDTH, DEPTH, MLP = 4, 16, 2, 32


def tiny_sweep() -> ConfigDict:
    sweep = ConfigDict()
    sweep.base = tiny_config()
    with sweep.base.unlocked():
        sweep.base.encoder.patch_size = 12
    sweep.candidates = ConfigDict(
        {
            "pool": {"budgets": (1,), "connector": {"kind": "pool"}},
            "random": {"budgets": (2,), "connector": {"kind": "mlp"}, "reducer": {"kind": "random"}},
        }
    )
    sweep.sweep = ConfigDict({"shared": ("seeing",), "seeds": (0,), "controls": ("random",)})
    return sweep.lock()


@pytest.fixture
def config() -> ConfigDict:
    return tiny_sweep()


def new_console():
    return rich.console.Console(file=io.StringIO(), width=200)


@pytest.fixture
def console():
    return new_console()


def make(config, workdir, console, **settings) -> Sweep:
    return Sweep(config, workdir, config_path="configs/tiny.py", console=console, **settings)


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def test_points_are_costed_by_shape_in_closed_form(config):
    points = {point.label: point for point in list_points(config)}
    assert list(points) == ["pool@1", "random@2"]
    block_products = 4 * WIDTH * WIDTH + 2 * WIDTH * MLP
    attention = 2 * PATCHES * PATCHES * WIDTH  # logits and weighted values, all heads
    encoder = PATCHES * 12 * 12 * WIDTH + DEPTH * (PATCHES * block_products + attention)
    pool = points["pool@1"].costs
    assert pool.flops["encoder"] == 2 * encoder
    assert points["random@2"].costs.flops["connector"] == 2 * 2 * (2 * WIDTH * WIDTH)  # two tokens, two layers
    prompt = points["random@2"].experiment.prompt.length
    gated = 4 * WIDTH * WIDTH + 3 * WIDTH * MLP
    vocabulary = 26
    decoder = DEPTH * (prompt * gated + 2 * prompt * prompt * WIDTH) + WIDTH * vocabulary
    assert points["random@2"].costs.flops["prefill"] == 2 * decoder
    norms, biases = 4 * WIDTH, 5 * WIDTH + MLP  # of a block
    blocks = DEPTH * (block_products + norms + biases)
    assert pool.num_params["encoder"] == blocks + (12 * 12 + 1) * WIDTH + PATCHES * WIDTH + 2 * WIDTH
    assert pool.num_params["connector"] == 2 * (WIDTH * WIDTH + WIDTH)
    assert pool.num_visual_tokens == 1


@pytest.fixture
def on_one_device(one_device, monkeypatch):
    """A fraction of the time of eight devices, on which `tests/train` trains and `tests/generation` answers."""
    monkeypatch.setattr(point_run, "make_mesh", lambda settings: one_device)


@pytest.fixture
def undrawn(monkeypatch):
    """Without the frontier and the report, which `swept` has."""
    monkeypatch.setattr(sweep_run, "draw_frontier", lambda *arguments, **options: None)
    monkeypatch.setattr(sweep_run, "write_report", lambda *arguments, **options: None)


@dataclasses.dataclass(frozen=True)
class Swept:
    """A sweep that was killed in its second point, run to its end, and called once more.

    Attributes:
      workdir: its folder.
      first: `results.jsonl` when it was killed.
      trained: `metrics.jsonl` of the second point then.
      results: what the second call returned.
      evaluated: budgets of the evaluations that were begun.
      counts: how many of them had been at the end of each call.
      printed: what the second call printed.
    """

    workdir: pathlib.Path
    first: list[dict]
    trained: str
    results: list[dict]
    evaluated: list[int]
    counts: tuple[int, int, int]
    printed: str


@pytest.fixture(scope="module")
def swept(one_device, tmp_path_factory) -> Swept:
    workdir, evaluated = tmp_path_factory.mktemp("swept") / "sweep", []
    real = point_run.answers

    def dies_in_the_second_point(experiment, *arguments):
        evaluated.append(experiment.system.budget.left)
        if evaluated == [1, 2]:
            raise KeyboardInterrupt
        return real(experiment, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(point_run, "make_mesh", lambda settings: one_device)
        patch.setattr(point_run, "answers", dies_in_the_second_point)
        with pytest.raises(KeyboardInterrupt):
            make(tiny_sweep(), workdir, new_console()).run()
        first, trained = lines(workdir), metrics(workdir)
        counts, console = [len(evaluated)], new_console()
        results = make(tiny_sweep(), workdir, console).run()
        counts.append(len(evaluated))
        make(tiny_sweep(), workdir, new_console()).run()
        counts.append(len(evaluated))
    return Swept(workdir, first, trained, results, evaluated, tuple(counts), console.file.getvalue())


def metrics(workdir) -> str:
    return (workdir / "points" / "random@2" / "metrics.jsonl").read_text()


def test_a_sweep_is_resumed_where_it_was_killed_and_kept_when_it_is_finished(swept):
    assert len(swept.trained.splitlines()) == 8 and len(swept.first) == 1
    # The finished point was kept, the other one was evaluated, and not trained, again; and then nothing was.
    assert swept.evaluated == [1, 2, 2] and swept.counts == (2, 3, 3)
    assert metrics(swept.workdir) == swept.trained
    assert lines(swept.workdir) == swept.results and swept.results[:1] == swept.first


def test_what_a_sweep_writes_and_prints(swept):
    result = swept.results[1]
    assert {key: result[key] for key in ("connector", "token_budget", "num_visual_tokens", "seed")} == {
        "connector": "random",
        "token_budget": 2,
        "num_visual_tokens": 2,
        "seed": 0,
    }
    assert result["realised_visual_tokens"] == {"mean": 2, "max": 2} and result["mean_visual_tokens"] == 2
    assert set(result["accuracy"]) == {"read", "transcribe", "count", "locate"}
    for entry in result["accuracy"].values():
        assert entry["n"] == 3 and 0 <= entry["low"] <= entry["mean"] <= entry["high"] <= 1
    means = {task: values["mean"]["mean"] for task, values in result["scores"].items()}
    assert means == pytest.approx({task: entry["mean"] for task, entry in result["accuracy"].items()})
    assert result["command"] == (
        "python -m vlm_jax.cli.sweep --config=configs/tiny.py --only=random@2 --workdir=workdir/random@2"
    )
    assert (swept.workdir / "frontier.png").read_bytes().startswith(b"\x89PNG")
    report = (swept.workdir / "report.html").read_text()
    assert all(result["command"] in report for result in swept.results)
    with pytest.raises(ValueError, match=tried("nothing to report: {0} results, none with an accuracy; run the sweep")):
        combine_seeds([])
    assert [point.label for point in combine_seeds(swept.results)] == ["pool@1", "random@2"]
    printed = swept.printed
    assert "2 points, by shape" in printed and printed.index("by shape") < printed.index("95% intervals")


def test_a_point_whose_loss_is_high_is_stopped_and_the_other_has_its_row(
    config, console, swept, on_one_device, undrawn, tmp_path
):
    with config.unlocked(), config.base.unlocked():
        slow = config.base.stages.answering.to_dict()
        config.base.stages.slow = ConfigDict(slow | {"learning_rates": {"connector": 1e-9, "decoder": 1e-9}})
        config.candidates = ConfigDict({"pool": config.candidates.pool.to_dict()})
        config.candidates.slow = ConfigDict(config.candidates.pool.to_dict() | {"schedule": ("slow",)})
        config.sweep.update({"controls": (), "halving": {"first_steps": 2, "factor": 2}})
    workdir = tmp_path / "sweep"
    shutil.copytree(swept.workdir / "shared_0", workdir / "shared_0")
    (workdir / "config.json").write_text(json.dumps(plain(config) | {"init_from": None}))  # else it is no sweep's
    sweep = make(config, workdir, console)
    results = sweep.run()
    assert [untimed(result) for result in results] == [untimed(swept.results[0])]
    folders = {name: epath.Path(workdir / "points" / name) for name in ("pool@1", "slow@1")}
    curves = {name: [line["loss"] for line in each_line(folder / "metrics.jsonl")] for name, folder in folders.items()}
    rungs = {name: list(each_line(folder / "rungs.jsonl")) for name, folder in folders.items()}
    assert [(line["step"], line["stopped"]) for line in rungs["pool@1"]] == [(2, False), (4, False)]
    losses = [line["loss"] for line in rungs["pool@1"]]
    assert losses == pytest.approx([curves["pool@1"][1], curves["pool@1"][3]])
    last = rungs["slow@1"][-1]
    assert last["stopped"] and last["compared_with"] == 1 and len(curves["slow@1"]) == last["step"] < 8
    assert last["loss"] > rungs["pool@1"][len(rungs["slow@1"]) - 1]["loss"]
    where = f"at step {last['step']} with a loss of {last['loss']:.4g}, compared with 1 others"
    assert sweep.stopped == {"slow@1": where} and sweep.failed == {}
    assert f"slow@1: stopped {where}" in console.file.getvalue()
    again = make(config, workdir, console)
    assert again.run() == results and again.stopped == sweep.stopped
    assert lines(workdir) == results and len((workdir / "stopped.jsonl").read_text().splitlines()) == 1


def untimed(result) -> dict:
    measured = ("step_seconds", "prefill_seconds", "decode_seconds")
    return {key: value for key, value in result.items() if key not in measured}


def test_the_command_of_a_point_makes_it_again(config, console, swept, on_one_device, undrawn, tmp_path):
    """Also where points were once built differently, in another folder."""
    shutil.copytree(swept.workdir, tmp_path / "old")
    old = [{**result, "config_hash": "of old"} for result in swept.results]
    (tmp_path / "old" / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in old))
    with pytest.raises(ValueError, match=tried("the package builds points differently now. Use another --workdir")):
        make(config, tmp_path / "old", console).run()
    alone = make(config, tmp_path / "new", console, only=("random@2",)).run()
    assert [result["label"] for result in alone] == ["random@2"]
    assert untimed(alone[0]) == untimed(swept.results[1])


def test_a_point_is_timed_with_one_seed(config):
    with config.unlocked():
        config.sweep.seeds = (0, 3)
    points = {point.label: point for point in list_points(config)}
    row = {"label": "pool@1", "connector": "pool", "token_budget": 1}
    timing = Timing([{**row, "prefill_seconds": 0.1}], {})
    assert not timing.is_due(points["pool@1#3"]) and timing.is_due(points["random@2#3"])
    assert not timing.is_due(points["random@2"])  # the other seed is
    assert Timing([row], {}).is_due(points["pool@1#3"])
    failed = {}
    timing = Timing([], failed)
    assert timing.is_due(points["pool@1"])
    failed["pool@1"] = "it has no times"
    assert timing.is_due(points["pool@1#3"])


def test_points_start_from_the_shared_stages(swept, one_device):
    shapes = {"encoder": placed(build(tiny_sweep().base).boxed_shapes(), one_device)["encoder"]}
    shared, *points = (
        read_parts(swept.workdir / run / "checkpoints", shapes)
        for run in ("shared_0", "points/pool@1", "points/random@2")
    )
    for point in points:  # the encoder is frozen after the shared stage
        jax.tree.map(np.testing.assert_array_equal, point, shared)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda c: c.candidates.pool.update({"budgets": (3,)}),
            InfeasibleBudget,
            "candidate 'pool' at 3 tokens: .*nearest feasible: 2 and 4",
        ),
        (lambda c: c.candidates.pool.update({"conector": {}}), ConfigError, r"candidates\.pool\.conector: unknown"),
        (
            lambda c: c.candidates.pool.connector.update({"factor": 2}),
            ConfigError,
            r"config\.connector\.factor: unknown",
        ),
        (
            lambda c: c.sweep.update({"controls": ("rando",)}),
            ConfigError,
            "no candidate 'rando'; did you mean 'random'",
        ),
        (
            lambda c: c.base.evaluation.update({"every": 2}),
            ConfigError,
            r"base\.evaluation\.every: points are evaluated",
        ),
        (
            lambda c: c.base.evaluation.update({"metrics": ("read=exat",)}),
            ConfigError,
            r"config\.base\.evaluation\.metrics: task 'read': there is no metric 'exat'; did you mean 'exact'",
        ),
        (lambda c: c.sweep.update({"shared": ("answering",)}), ConfigError, "must be the first stages"),
        (
            lambda c: c.base.stages.seeing.learning_rates.update({"connector": 1e-3}),
            ConfigError,
            "a shared stage trains no connector where every candidate has its own",
        ),
        (lambda c: c.base.update({"token_bugdet": 1}), ConfigError, r"config\.token_bugdet: .*'token_budget'"),
    ],
)
def test_a_bad_sweep_is_refused_before_anything_is_written(config, console, tmp_path, change, error, message):
    with config.unlocked(), config.base.unlocked():
        change(config)
    with pytest.raises(error, match=message):
        make(config, tmp_path / "sweep", console)
    assert not (tmp_path / "sweep").exists()


def test_an_unknown_point_is_refused(config, console, tmp_path):
    with config.unlocked():
        del config.candidates["random"]
        config.sweep.controls = ()
    with pytest.raises(ConfigError, match="no point 'pool@2'; did you mean 'pool@1'"):
        make(config, tmp_path / "sweep", console, only=("pool@2",))


def test_the_workdir_of_another_sweep_is_refused(config, console, swept):
    with config.unlocked():
        config.base.optimizer.weight_decay = 0.5
    with pytest.raises(ConfigError, match=r"config\.base\.optimizer\.weight_decay: 0\.05 here, 0\.5 there"):
        make(config, swept.workdir, console)


def test_a_sweep_takes_more_seeds_and_candidates(config, console, swept):
    with config.unlocked():
        config.sweep.seeds = (0, 3)
        config.candidates.another = ConfigDict({"budgets": (4,), "connector": {"kind": "mlp"}})
    grown = make(config, swept.workdir, console)
    hashes = {point.label: config_hash(point.config) for point in grown.points}
    assert sorted(hashes) == ["another@4", "another@4#3", "pool@1", "pool@1#3", "random@2", "random@2#3"]
    assert {line["label"]: line["config_hash"] for line in lines(swept.workdir)}.items() <= hashes.items()


def test_a_nested_candidate_is_trained_once_and_evaluated_at_every_budget(
    config, console, on_one_device, undrawn, tmp_path
):
    connector = {"kind": "matryoshka", "budgets": (1, 2, 4), "inner": {"kind": "pool"}}
    with config.unlocked():
        config.candidates = ConfigDict({"nested": {"budgets": (1, 4), "trained_at": 4, "connector": connector}})
        config.sweep.controls = config.sweep.shared = ()
        config.base.schedule = ("answering",)
        del config.base.stages["seeing"]
    sweep = make(config, tmp_path / "sweep", console)
    results = sweep.run()
    assert [result["label"] for result in results] == ["nested@1", "nested@4"]
    assert [result["realised_visual_tokens"] for result in results] == [{"mean": n, "max": n} for n in (1, 4)]
    assert results[0]["step_seconds"] == results[1]["step_seconds"]  # of the one training
    trained = sorted(path.parent.name for path in (tmp_path / "sweep" / "points").glob("*/metrics.jsonl"))
    assert trained == ["nested@4"]
    assert all((tmp_path / "sweep" / "points" / name / "answers.jsonl").exists() for name in ("nested@1", "nested@4"))
    assert sweep.outcome("nested@1") is sweep.outcome("nested@4")
    assert len(make(config, tmp_path / "sweep", console).run()) == 2  # and is taken up again


def test_a_connector_that_does_not_nest_is_not_trained_once(config, console, tmp_path):
    with config.unlocked():
        config.candidates = ConfigDict(
            {"queries": {"budgets": (1, 4), "trained_at": 4, "connector": {"kind": "resampler", "num_heads": 2}}}
        )
        config.sweep.controls = ()
    with pytest.raises(ConfigError, match=r"queries\.trained_at: the parameters for 4 tokens have other shapes"):
        make(config, tmp_path / "sweep", console)

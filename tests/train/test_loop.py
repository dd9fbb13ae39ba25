"""The loop against itself on another mesh, interrupted, and stage by stage."""

import os
import shutil
import signal

import jax
import numpy as np
import pytest
from etils import epath

from vlm_jax.build import build
from vlm_jax.checkpoints.runs import read_parts
from vlm_jax.checkpoints.verification import CheckpointError
from vlm_jax.config import ConfigError
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.rules import placed
from vlm_jax.system import UnsupportedError
from vlm_jax.train import loop
from vlm_jax.train.loop import Diverged, Interrupted, Trainer
from vlm_jax.train.workdir import read_lines

from ..advice import tried
from .conftest import tiny_config


def losses(workdir) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_lines(epath.Path(workdir) / "metrics.jsonl")}


def train(config, mesh, workdir, **settings):
    return Trainer(config, build(config), mesh, workdir, **settings).run()


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def finished(one_device, tmp_path_factory):
    """The workdir of a whole run, for tests that only read it, and its outcome."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, train(tiny_config(), one_device, workdir)


def test_sharded_losses_equal_those_of_one_device(config, one_device, tmp_path):
    with config.unlocked():
        config.schedule = ("answering",)
        del config.stages["seeing"]
        config.stages.answering.steps = 4
        config.stages.answering.learning_rates = {"encoder": 1e-3, "connector": 2e-3, "decoder": 1e-3}
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    outcome = train(config, mesh, tmp_path / "eight")
    kernel = outcome.params["decoder"]["blocks"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (2, 16, 32)
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 8, 16)  # embed over fsdp, mlp over tensor
    train(config, one_device, tmp_path / "one")
    eight, one = losses(tmp_path / "eight"), losses(tmp_path / "one")
    assert sorted(eight) == sorted(one) == [1, 2, 3, 4]
    np.testing.assert_allclose([eight[s] for s in one], [one[s] for s in one], atol=1e-4)
    assert one[4] < one[1]


def test_a_frozen_part_stays_and_a_trained_one_moves(config, one_device, finished, tmp_path):
    with config.unlocked():
        config.schedule = ("seeing",)
        del config.stages["answering"]
    after_first = train(config, one_device, tmp_path).params
    after_both = finished[1].params
    for part, moved in (("encoder", False), ("cell_head", False), ("connector", True), ("decoder", True)):
        pairs = zip(jax.tree.leaves(after_first[part]), jax.tree.leaves(after_both[part]), strict=True)
        same = [bool(np.array_equal(a, b)) for a, b in pairs]
        # Biases of keys have no gradient but the softmax's rounding, so not every leaf must move.
        assert all(same) if not moved else sum(same) == 0, (part, same)


def test_a_run_that_is_stopped_and_killed_goes_on_to_the_same_losses(config, one_device, finished, tmp_path):
    for stop in (2, 4, 6):  # inside the first stage, at its end, inside the second

        def terminate(step, steps, metrics, stop=stop):
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Interrupted, match="saved at step"):
            train(config, one_device, tmp_path, progress=terminate)

    def kill(step, steps, metrics):
        if step == 9:  # the newest checkpoint is before it
            raise Killed

    with pytest.raises(Killed):
        train(config, one_device, tmp_path, progress=kill)
    assert sorted(losses(tmp_path)) == list(range(1, 10))
    train(config, one_device, tmp_path)
    lines = read_lines(epath.Path(tmp_path) / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))  # those after the checkpoint are repeated once
    assert losses(tmp_path) == losses(finished[0])


def test_a_finished_run_is_not_trained_again(config, one_device, finished):
    workdir, first = finished
    written = (workdir / "metrics.jsonl").read_text()
    trainer = Trainer(config, build(config), one_device, workdir)
    assert trainer.finished()
    second = trainer.run()
    assert second.step_seconds == first.step_seconds
    assert (workdir / "metrics.jsonl").read_text() == written
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_init_from_takes_encoder_and_decoder_and_draws_the_rest(config, one_device, finished, tmp_path):
    workdir, source = finished
    with config.unlocked():
        config.seed = 7
    trainer = Trainer(config, build(config), one_device, tmp_path, init_from=workdir)
    start = trainer._first_state(trainer._spans[0]).params
    for part, same in (("encoder", True), ("decoder", True), ("connector", False)):
        kernels = [
            (a, b)
            for a, b in zip(jax.tree.leaves(source.params[part]), jax.tree.leaves(start[part]), strict=True)
            if a.ndim > 1
        ]
        assert all(bool(np.array_equal(a, b)) is same for a, b in kernels), part


def test_a_finished_run_goes_on_with_more_steps_and_other_keys_of_the_loop(config, one_device, tmp_path):
    with config.unlocked():
        config.schedule = ("answering",)
        del config.stages["seeing"]
        config.optimizer.final_scale = 1.0  # rates after the warm-up do not depend on the number of steps
    with config.unlocked():
        config.stages.answering.steps = 6
    train(config, one_device, tmp_path / "whole")
    with config.unlocked():
        config.stages.answering.steps = 4
    train(config, one_device, tmp_path / "parts")
    with config.unlocked():
        config.stages.answering.steps, config.loop.log_every, config.loop.keep = 6, 3, 1
    assert not Trainer(config, build(config), one_device, tmp_path / "parts").finished()
    train(config, one_device, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_that_fails_before_its_first_step_leaves_nothing(config, one_device, finished, tmp_path):
    trainer = Trainer(config, build(config), one_device, tmp_path / "run", init_from=finished[0] / "elsewhere")
    with pytest.raises(CheckpointError, match="elsewhere"):
        trainer.run()
    assert not any(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named_with_the_way_on(config, one_device, finished, tmp_path, caplog):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    checkpoints = tmp_path / "checkpoints"
    assert sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()) == [10, 12]
    (checkpoints / "12" / "position" / "metadata").write_text("[]")
    assert not Trainer(config, build(config), one_device, tmp_path).finished()
    again = train(config, one_device, tmp_path)
    assert "12/position/metadata: expected a JSON object" in caplog.text
    assert f"resumes from checkpoint 10; {checkpoints / '12'} is kept as 12.damaged" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, again.params, finished[1].params)
    assert losses(tmp_path) == losses(finished[0])
    assert (checkpoints / "12.damaged" / "position" / "metadata").read_text() == "[]"

    for step in ("10", "12"):
        (checkpoints / step / "state" / "manifest.ocdbt").unlink()
    told = tried("No other checkpoint is left; delete the folder {} and run the same command to start anew")
    with pytest.raises(CheckpointError, match=f"checkpoint 12 .*12/state/manifest.ocdbt: is missing.*{told}"):
        train(config, one_device, tmp_path)
    assert (checkpoints / "12").exists()  # nothing is moved where nothing can be read
    shutil.rmtree(checkpoints)
    again = train(config, one_device, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, finished[1].params)


def test_parameters_of_a_run_without_a_release_are_in_its_checkpoints(config, one_device, finished, tmp_path):
    experiment = build(config)
    with pytest.raises(
        UnsupportedError, match=tried("from a config has no released schema; use its run's checkpoints")
    ):
        experiment.system.save_pretrained(tmp_path / "saved", finished[1].params)
    shapes = placed(experiment.boxed_shapes(), one_device)
    found = read_parts(finished[0] / "checkpoints", {"decoder": shapes["decoder"]})
    jax.tree.map(np.testing.assert_array_equal, found["decoder"], finished[1].params["decoder"])


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(config, one_device, tmp_path):
    with config.unlocked():
        config.stages.seeing.learning_rates.encoder = 1e30
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) .* at step 3 \(stage seeing\)"):
        train(config, one_device, tmp_path)
    assert [line["step"] for line in read_lines(epath.Path(tmp_path) / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": ("seeing", "answer")}, r"config\.schedule: no stage 'answer' .*did you mean 'answering'"),
        ({"schedule": ("seeing",)}, r"config\.stages\.answering: unknown or unused key"),
        ({"stages.seeing.objective": "read_cell"}, r"stages\.seeing\.objective: no kind 'read_cell'.*'read_cells'"),
        ({"stages.answering.stream": "question"}, r"stages\.answering\.stream: unknown 'question'.*'questions'"),
        (
            {"stages.answering.stream": "cells"},
            r"stream: the objective next_token takes questions or text_pages or fine_text_pages, got 'cells'",
        ),
        ({"stages.answering.learning_rates": {"conector": 1.0}}, r"learning_rates\.conector.*'connector'"),
        ({"stages.answering.learning_rates": {}}, "expected at least one above 0, got none"),
        ({"stages.answering.warmup_steps": 8}, "expected fewer than 8 steps, got 8"),
        ({"stages.answering.z_loss": -1.0}, r"answering\.z_loss: expected at least 0, got -1"),
        ({"stages.answering.logits_bytes": 0}, r"answering\.logits_bytes: expected at least 1, or None, got 0"),
        ({"stages.seeing.z_loss": 1e-4}, r"seeing\.z_loss: is a key of the objective next_token; remove it"),
        ({"stages.answering.batch": 8}, r"config\.stages\.answering\.batch: unknown.*'batch_size'"),
        ({"loop.save_every": 0}, r"config\.loop\.save_every: expected at least 1, got 0"),
        ({"loop.log_every": 0}, r"config\.loop\.log_every: expected at least 1, got 0"),
        ({"loop.keep": -1}, r"config\.loop\.keep: expected at least 1, got -1"),
        ({"optimizer.clip_norm": 0.0}, r"config\.optimizer\.clip_norm: expected above 0 .inf for no clipping., got 0"),
        ({"seed": -1}, r"config\.seed: expected at least 0, got -1"),
        ({"seed": 20261128152254}, r"config\.seed: expected .*at most 4,294,967,295, got 20261128152254"),
        ({"loop.save_evry": 8}, r"config\.loop\.save_evry: unknown or unused key; did you mean 'save_every'"),
        ({"optimizer.b1": "high"}, r"config\.optimizer\.b1: expected float, got 'high'"),
    ],
)
def test_a_stage_that_cannot_be_run_is_refused_before_anything_is_written(
    config, one_device, tmp_path, change, message
):
    with config.unlocked(), config.ignore_type():
        for path, value in change.items():
            *sections, key = path.split(".")
            section = config
            for name in sections:
                section = section[name]
            section[key] = value
    with pytest.raises(ConfigError, match=message):
        Trainer(config, build(config), one_device, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Slow:
    """Batches of a stream that take five seconds each, by a clock that is turned on."""

    def __init__(self, iterator, clock):
        self.iterator, self.clock = iterator, clock

    def __iter__(self):
        return self

    def __next__(self):
        self.clock.now += 5.0
        return next(self.iterator)

    def __getattr__(self, name):
        return getattr(self.iterator, name)


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


def test_the_log_says_for_how_long_a_step_stood_still_for_its_batch(config, one_device, tmp_path, monkeypatch):
    clock = Clock()
    made = loop.stage_batches
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(loop, "stage_batches", lambda *given, **more: Slow(made(*given, **more), clock))
    done = loop.is_done

    def busy_in_the_second_stage(metrics):  # devices that are never done when the next batch comes
        return done(metrics) if metrics is None or "box_l1" in metrics else False

    monkeypatch.setattr(loop, "is_done", busy_in_the_second_stage)
    train(config, one_device, tmp_path)
    lines = read_lines(epath.Path(tmp_path / "metrics.jsonl"))
    expected = [5.0] * 4 + [5.0] + [0.0] * 7  # the first step of a stage has nothing to hide after
    assert [line["input_seconds"] for line in lines] == expected

"""What a run's folder lets in: logs, a corrected command, other keys of the loop, another start, one writer."""

import itertools
import json

import jax
import numpy as np
import pytest
from etils import epath

from vlm_jax.build import build
from vlm_jax.checkpoints.orbax import parts_directory
from vlm_jax.config import ConfigError
from vlm_jax.evals.evaluators import evaluator_of
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train import loop
from vlm_jax.train.claim import Claim
from vlm_jax.train.lock import WorkdirInUse
from vlm_jax.train.loop import Diverged, Trainer, first_params

from .files import config_of, records, write


def trainer_of(config, workdir, **more):
    experiment = build(config)
    mesh = make_mesh(MeshSettings(data=1), jax.devices()[:1])
    return Trainer(config, experiment, mesh, workdir, evaluator=evaluator_of(experiment, config), **more)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run whose command was misspelt first, in a folder that has a log file: (its folder, the error of the first)."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    workdir.mkdir()
    (workdir / "train.log").write_text("mine")
    with pytest.raises(ConfigError) as misspelt:
        trainer_of(config_of(folder, data__train_path=f"{folder}/trian.jsonl"), workdir)
    trainer_of(config_of(folder), workdir).run()
    return workdir, str(misspelt.value)


def test_05_a_misspelt_path_is_named_and_leaves_the_folder_to_the_corrected_command(run, folder):
    workdir, misspelt = run
    assert f"config.data.train_path: there is no file '{folder}/trian.jsonl'" in misspelt
    assert json.loads((workdir / "config.json").read_text())["data"]["train_path"] == f"{folder}/train.jsonl"
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 4


def test_45_a_log_in_the_folder_stays(run):
    assert (run[0] / "train.log").read_text() == "mine"


def test_07_another_start_is_refused_in_a_folder_of_a_run_from_scratch(run, folder, tmp_path):
    for start in (tmp_path, run[0]):
        with pytest.raises(ConfigError, match=r"no --init_from.*, and --init_from is now .*use another --workdir"):
            trainer_of(config_of(folder), run[0], init_from=start)


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_08_a_run_starts_from_another_runs_folder_or_its_checkpoints(run, folder, inside):
    before = sorted(str(path) for path in run[0].rglob("*"))
    config, mesh = config_of(folder), make_mesh(MeshSettings(data=1), jax.devices()[:1])
    experiment = build(config)
    params = first_params(experiment, mesh, 5, parts_directory(run[0] / inside), experiment.parts)
    drawn, trained = first_params(experiment, mesh, 5, None, ()), trainer_of(config, run[0]).run().params
    jax.tree.map(np.testing.assert_array_equal, params["decoder"], trained["decoder"])
    kernels = [[leaf for leaf in jax.tree.leaves(one["decoder"]) if leaf.ndim > 1] for one in (params, drawn)]
    assert not any(np.array_equal(ours, theirs) for ours, theirs in zip(*kernels, strict=True))
    assert sorted(str(path) for path in run[0].rglob("*")) == before


@pytest.mark.parametrize(
    "change", [{"evaluation__batch_size": 2}, {"loop__keep": 3}, {"loop__log_every": 2}, {"loop__input_workers": 1}]
)
def test_32_keys_that_change_no_number_of_the_training_may_change(run, folder, change):
    assert trainer_of(config_of(folder, **change), run[0]).finished()


def test_06_a_reference_over_the_limit_is_told_before_the_training_and_the_named_key_helps(folder, tmp_path):
    rows = [*records(3), {"id": 9, "image": "1.png", "question": "what?", "answer": "a" * 40}]
    rows = [{**row, "image": f"{folder}/{row['image']}"} for row in rows]
    changes = {"data__evaluation_path": write(tmp_path / "long.jsonl", rows)}
    with pytest.raises(SequenceTooLong, match=r"long\.jsonl:9': .* 41 tokens .* raise (.*)$") as caught:
        trainer_of(config_of(folder, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    key = str(caught.value).rsplit("raise ", 1)[1].removeprefix("config.").replace(".", "__")
    trainer_of(config_of(folder, **changes, **{key: 41}), tmp_path / "run")


def test_36_a_second_process_is_refused_and_told_who_runs(folder, tmp_path):
    config, workdir = config_of(folder), epath.Path(tmp_path) / "run"
    with Claim(workdir, config).held(), pytest.raises(WorkdirInUse, match="is in use by process"):
        trainer_of(config, workdir).run()


@pytest.mark.parametrize("last", [True, False])
def test_20_a_gradient_that_is_no_number_ends_the_run_and_is_not_saved(folder, tmp_path, monkeypatch, last):
    """At the last step as in the middle; the loss is finite, as where the backward pass overflows."""
    made = loop.compile_step

    def compiled(like, batch, mesh, *, objective, **settings):
        def loss(params, batch, key, weight=1.0, reference=None):
            value, metrics = objective(params, batch, key, weight, reference)
            zero = jax.tree.leaves(params["decoder"])[0] * 0.0
            return value + jax.numpy.sqrt(jax.numpy.sum(zero)), metrics  # adds 0; its derivative is no number

        return made(like, batch, mesh, objective=loss, **settings)

    monkeypatch.setattr(loop, "compile_step", compiled)
    config = config_of(folder, stages__tuning__steps=1 if last else 3, loop__save_every=1)
    with pytest.raises(Diverged, match="the norm of the gradient nan at step 1"):
        trainer_of(config, tmp_path / "run").run()
    saved = itertools.chain((tmp_path / "run").glob("checkpoints/[0-9]*"), (tmp_path / "run").glob("evaluation*"))
    assert not list(saved)

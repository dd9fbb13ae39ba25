"""A sweep goes on where one of its points cannot, and has one writer."""

import io
import json

import jax
import pytest
import rich.console
from ml_collections import ConfigDict

from vlm_jax.config import ConfigError
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sweep import point_run
from vlm_jax.sweep.failures import summary
from vlm_jax.sweep.run import Sweep
from vlm_jax.train.lock import WorkdirInUse

from .files import config_of


def sweep_of(folder, workdir, *labels, only=()):
    """Candidates by label: `bad` has rotary angles that are no numbers."""
    config = ConfigDict()
    config.base = config_of(folder, stages__tuning__steps=1, evaluation__max_new_tokens=2)
    bad = {**config.base.decoder.to_dict(), "rope": {"theta": float("nan")}}
    candidates = {
        "pool": {"budgets": (4,), "connector": {"kind": "pool"}},
        "bad": {"budgets": (1,), "connector": {"kind": "pool"}, "decoder": bad},
    }
    config.candidates = ConfigDict({label: candidates[label] for label in labels})
    config.sweep = ConfigDict({"shared": (), "seeds": (0,), "controls": ()})
    console = rich.console.Console(file=io.StringIO(), width=200)
    return Sweep(config.lock(), workdir, config_path="x.py", only=only, console=console)


def test_18_a_point_that_cannot_be_is_named_and_the_others_are_run(folder, tmp_path, monkeypatch):
    mesh = make_mesh(MeshSettings(data=1), jax.devices()[:1])
    monkeypatch.setattr(point_run, "make_mesh", lambda settings: mesh)
    sweep = sweep_of(folder, tmp_path / "sweep", "bad", "pool")
    assert [line["label"] for line in sweep.run()] == ["pool@4"]
    error = "candidate 'bad' at 1 tokens: config.decoder.rope.theta: expected above 0, got nan"
    assert sweep.failed == {"bad@1": f"OutOfRange: {error}"}
    assert json.loads((tmp_path / "sweep" / "failed.jsonl").read_text())["label"] == "bad@1"
    assert "1 of 2 points failed: bad@1" in summary(sweep.failed, sweep.num_points, sweep.workdir)


def test_18_a_sweep_of_which_nothing_is_left_is_refused(folder, tmp_path):
    for labels, only in ((("bad",), ()), (("bad", "pool"), ("bad@1",))):
        with pytest.raises(ConfigError, match=r"config\.decoder\.rope\.theta: expected above 0, got nan"):
            sweep_of(folder, tmp_path / "sweep", *labels, only=only)
    assert not (tmp_path / "sweep").exists()
    assert not sweep_of(folder, tmp_path / "sweep", "bad", "pool", only=("pool@4",))._refused


def test_17_a_second_worker_on_the_folder_is_refused(folder, tmp_path):
    first, second = (sweep_of(folder, tmp_path / "sweep", "pool") for _ in range(2))
    with first._claim.held(), pytest.raises(WorkdirInUse, match="is in use by process"):
        second.run()

"""Who may use a run's folder, and what a start leaves behind."""

import json
import os
import subprocess
import sys

import jax
import pytest
from etils import epath

from vlm_jax.config import ConfigError
from vlm_jax.train import lock as locks
from vlm_jax.train.claim import Claim
from vlm_jax.train.lock import WorkdirInUse, lock
from vlm_jax.train.workdir import WorkdirError

from ..advice import tried

CONFIG = {
    "seed": 0,
    "release": None,
    "loop": {"keep": 2},
    "mesh": {"fsdp": 4},
    "evaluation": {"batch_size": 8},
    "data": {"train_path": "a.json", "max_checked": 5},
    "stages": {"one": {"steps": 4}, "two": {"steps": 6}},
}


def changed(path, value):
    config = json.loads(json.dumps(CONFIG))
    *sections, key = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[key] = value
    return config


def recorded(workdir, config=CONFIG, **more):
    claim = Claim(workdir, config, last_stage="two", **more)
    with claim.held():
        claim.record()
    return json.loads((workdir / "config.json").read_text())


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path) / "parent" / "run"


def test_a_start_that_fails_leaves_nothing(workdir, tmp_path):
    with pytest.raises(ZeroDivisionError), Claim(workdir, CONFIG).held():
        (workdir / "rows" / "loads").mkdir(parents=True)
        (workdir / "checkpoints").mkdir()
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())
    workdir.mkdir(parents=True)
    (workdir / "train.log").write_text("mine")
    with pytest.raises(ZeroDivisionError), Claim(workdir, CONFIG).held():
        (workdir / "rows").mkdir()
        raise ZeroDivisionError
    assert [path.name for path in workdir.iterdir()] == ["train.log"]
    assert recorded(workdir, changed("seed", 1))["seed"] == 1  # the corrected command has the folder
    assert (workdir / "train.log").read_text() == "mine"


@pytest.mark.parametrize("name", ["thesis/chapter", "metrics.jsonl", "checkpoints/5/state"])
def test_a_folder_of_something_else_is_refused(workdir, name):
    (workdir / name).parent.mkdir(parents=True)
    (workdir / name).write_text("words")
    told = tried("and no {config.json}, so it is not a run's folder; use another --workdir")
    with pytest.raises(ConfigError, match=f"has {name.split('/')[0]} {told}"):
        Claim(workdir, CONFIG)
    assert recorded(workdir / "another") == recorded(workdir / "another")


def test_a_file_is_no_folder_of_a_run(workdir):
    workdir.parent.mkdir()
    workdir.write_text("words")
    with pytest.raises(ConfigError, match=tried("expected a folder, found a file; use another --workdir")):
        Claim(workdir, CONFIG)
    assert recorded(workdir.parent / "another")["seed"] == CONFIG["seed"]


def test_another_start_is_refused_with_both(workdir):
    recorded(workdir, init_from="/runs/a/checkpoints")
    with pytest.raises(ConfigError, match=r"started from /runs/a/checkpoints, .* is now /runs/b/checkpoints"):
        Claim(workdir, CONFIG, init_from="/runs/b/checkpoints")
    with pytest.raises(ConfigError, match=r"started from /runs/a/checkpoints, .* is now its own first parameters"):
        Claim(workdir, CONFIG)
    with pytest.raises(ConfigError, match=tried("use another --workdir, or the original --init_from")):
        Claim(workdir, CONFIG)
    assert recorded(workdir, init_from="/runs/a/checkpoints") == recorded(workdir, init_from="/runs/a/checkpoints")
    assert recorded(workdir.parent / "another")["seed"] == CONFIG["seed"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("loop.keep", 9),
        ("mesh.fsdp", 2),
        ("loop.on_nonfinite", "skip"),
        ("evaluation.batch_size", 1),
        ("data.max_checked", 7),
    ],
)
def test_keys_that_move_no_number_may_change_and_are_recorded(workdir, path, value):
    recorded(workdir)
    section, key = path.split(".")
    assert recorded(workdir, changed(path, value))[section][key] == value


@pytest.mark.parametrize(("path", "value"), [("seed", 1), ("stages.one.steps", 5), ("stages.two.steps", 5)])
def test_other_keys_may_not(workdir, path, value):
    before = recorded(workdir)
    told = tried("was created with another config; use another --workdir, or the original config. In the folder (here)")
    with pytest.raises(ConfigError, match=rf"{told}(.|\n)*config\.{path}: . here, {value} there"):
        Claim(workdir, changed(path, value), last_stage="two")
    assert recorded(workdir.parent / "another", changed(path, value)) != before and recorded(workdir) == before
    assert json.loads((workdir / "config.json").read_text()) == before


def test_a_sweep_may_draw_more_points(workdir):
    """The first ones stay; with other ranges they would not."""
    of_sweep = {"sweep": {"random": {"num_points": 2, "ranges": {"rate": {"key": "a.b", "low": 0.1, "high": 1.0}}}}}
    recorded(workdir, of_sweep)
    more = json.loads(json.dumps(of_sweep))
    more["sweep"]["random"]["num_points"] = 5
    assert recorded(workdir, more)["sweep"] == more["sweep"]
    more["sweep"]["random"]["ranges"]["rate"]["low"] = 0.2
    with pytest.raises(ConfigError, match=r"config\.sweep\.random\.ranges\.rate\.low: 0\.1 here, 0\.2 there"):
        Claim(workdir, more)


def test_the_last_stage_may_have_more_steps(workdir, caplog):
    recorded(workdir)
    assert recorded(workdir, changed("stages.two.steps", 9))["stages"]["two"]["steps"] == 9
    assert "stage two goes on to 9 steps: learning rates" in caplog.text
    with pytest.raises(ConfigError, match=r"config\.stages\.two\.steps: 9 here, 6 there"):
        Claim(workdir, CONFIG, last_stage="two")


def test_paths_are_recorded_in_absolute_form(workdir, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "released").mkdir()
    config = changed("release", "released") | {"data": {"train_path": "~/a.json", "mixture": {"b": {"path": "*.json"}}}}
    found = recorded(workdir, config)
    assert found["release"] == str(tmp_path / "released") and found["data"]["train_path"] == str(tmp_path / "a.json")
    assert found["data"]["mixture"]["b"]["path"] == str(tmp_path / "*.json")
    monkeypatch.chdir("/")
    Claim(workdir, config | {"release": str(tmp_path / "released")} | {"data": found["data"]})
    assert recorded(workdir.parent / "hub", changed("release", "org/name"))["release"] == "org/name"


def test_heartbeats_of_other_processes_stay_where_the_first_one_fails_early(workdir, monkeypatch):
    for count, left in ((1, []), (2, ["heartbeats"])):
        monkeypatch.setattr(jax, "process_count", lambda count=count: count)
        with pytest.raises(KeyError), Claim(workdir, CONFIG).held():
            (workdir / "heartbeats").mkdir()
            (workdir / "checkpoints").mkdir()
            raise KeyError
        assert [path.name for path in (workdir.iterdir() if workdir.exists() else ())] == left


@pytest.mark.parametrize("content", [b"", b'{"seed": 0, "lo', b"[]", b"\xff\xfe"])
def test_a_config_that_was_cut_short_is_named(workdir, content):
    recorded(workdir)
    (workdir / "config.json").write_bytes(content)
    told = tried("has to be that of the run's start; put it back, or use another --workdir")
    with pytest.raises(ConfigError, match=rf"{workdir}/config\.json: (not JSON|expected a JSON object).*{told}"):
        Claim(workdir, CONFIG)
    assert recorded(workdir.parent / "another")["seed"] == CONFIG["seed"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    told = tried("cannot be written ({}); fix the permissions, or use another --workdir")
    with pytest.raises(WorkdirError, match=f"^/sys/run: {told}"):  # where not even root may make a folder
        recorded(epath.Path("/sys/run"))
    with pytest.raises(WorkdirError, match=f"^/sys: {told}"), lock(epath.Path("/sys/run.lock")):
        pass
    assert recorded(epath.Path(tmp_path) / "run")["seed"] == CONFIG["seed"]


HOLD = """
import sys, etils.epath, vlm_jax.train.lock
with vlm_jax.train.lock.lock(etils.epath.Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""


def test_a_lock_ends_with_its_process(tmp_path):
    path = epath.Path(tmp_path) / "run.lock"
    words = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        with pytest.raises(WorkdirInUse, match=rf"{tmp_path} is in use by process {holder.pid} on "), lock(path):
            pass
        holder.kill()
    assert path.exists()  # left by the process that was killed
    with lock(path), pytest.raises(WorkdirInUse, match=f"process {os.getpid()} "), lock(path):
        pass
    with lock(path):
        told = tried("is in use by {}; wait until it ends, stop it, or use another --workdir")
        with pytest.raises(WorkdirInUse, match=told), lock(path):
            pass
        with lock(path.with_name("another.lock")):
            pass
    assert not path.exists()
    with lock(path):
        pass


def test_without_locks_the_newest_process_has_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "is_remote", lambda path: True)
    path = epath.Path(tmp_path) / "run.lock"
    with lock(path) as first:
        first()
        with lock(path) as second:
            second()
            with pytest.raises(WorkdirInUse, match=f"was taken over by process {os.getpid()} on"):
                first()
        with pytest.raises(WorkdirInUse, match="was taken over by another process, which has ended"):
            first()
    assert not path.exists()

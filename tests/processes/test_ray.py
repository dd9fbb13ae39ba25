"""A sweep and an evaluation on a Ray cluster of two hosts, of which one is killed, against the local executor."""

import contextlib
import itertools
import json
import os
import pathlib
import re
import secrets
import signal
import subprocess
import sys

import pytest

from tests.sweep.releases import write_questions, write_release
from vlm_jax.sweep.evaluation import Evaluation, ReleaseEvaluation

from ..advice import tried
from .conftest import ROOT, environment
from .test_two_processes import free_port
from .watching import curve, finish, processes_of, rows, steps, wait_for

RAY = pathlib.Path(sys.executable).with_name("ray")
# A token of this run's own: what Ray does without depends on whether the user has one.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def start_host(*arguments: str) -> subprocess.Popen:
    """A Ray host of one CPU that has joined its cluster."""
    words = [str(RAY), "start", "--block", "--disable-usage-stats", "--num-cpus=1"]
    host = subprocess.Popen(
        [*words, f"--object-store-memory={80 * 2**20}", *arguments],
        env={**environment(), **TOKEN, "PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    for line in host.stdout:
        said.append(line)
        if "Ray runtime started" in line:
            return host
    raise AssertionError("".join(said))


def kill_host(host: subprocess.Popen) -> None:
    """Kills all processes of a host at once, as a loss of power does; once."""
    if host.poll() is not None:
        return
    for process in processes_of(host):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    host.wait()
    host.stdout.close()


@pytest.fixture(scope="module")
def hosts(programs):
    """(address of the cluster, its second host)."""
    address = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        first = start_host("--head", "--include-dashboard=false", f"--port={address.partition(':')[2]}")
        stack.callback(kill_host, first)
        second = start_host(f"--address={address}")
        stack.callback(kill_host, second)
        yield address, second


def start(command: str, *arguments: str) -> subprocess.Popen:
    words = [sys.executable, "-m", f"vlm_jax.cli.{command}", "--compilation_cache=", *arguments]
    return subprocess.Popen(
        words, cwd=ROOT, env={**environment(), **TOKEN}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_sweep_whose_second_host_is_killed_has_the_rows_of_the_local_executor(hosts, tmp_path):
    address, second = hosts
    config = "--config=tests/processes/ray_sweep.py"
    finish(start("sweep", config, f"--workdir={tmp_path / 'local'}"))
    on_ray = ("--executor=ray", f"--ray_address={address}")
    workdir, labels = tmp_path / "ray", ("pool@1", "random@2")
    process = start("sweep", config, f"--workdir={workdir}", *on_ray)

    def lost():
        """The point that the second host runs, with its lines so far, once its first checkpoint is whole."""
        for label in labels:
            lines, point = steps(workdir, label), workdir / "points" / label
            if not 60 <= len(lines) < 280 or not any(path.name.isdigit() for path in (point / "checkpoints").iterdir()):
                continue
            if int(re.findall(r"\d+", (point / "point.lock").read_text())[0]) in processes_of(second):
                return label, lines
        return None

    label, before = wait_for(lost, process)
    kill_host(second)
    errors = finish(process)
    assert re.findall(r"(\S+): its worker was lost", errors) == [label], errors
    assert "a point takes 1 CPUs; the points of a host run one after another, 2 at a time in all" in errors

    assert rows(workdir) == rows(tmp_path / "local") and len(rows(workdir)) == 2
    after = steps(workdir, label)
    assert after[:50] == before[:50]  # with their times: those steps were not taken again
    for name in labels:
        assert curve(steps(workdir, name)) == curve(steps(tmp_path / "local", name))
        paths = [folder / "points" / name / "answers.jsonl" for folder in (workdir, tmp_path / "local")]
        assert paths[0].read_text() == paths[1].read_text()
    assert (workdir / "report.html").exists() and (workdir / "failed.jsonl").read_text() == ""


def test_an_evaluation_whose_command_is_killed_has_the_rows_of_the_local_executor(hosts, tmp_path):
    release, questions = tmp_path / "release", tmp_path / "questions.jsonl"
    write_release(release)
    write_questions(questions, [["a"], ["b"]])
    settings = {"reducers": ("none", "fastv"), "budgets": (4,), "batch_size": 1, "max_new_tokens": 2}
    assert Evaluation(ReleaseEvaluation(str(release), str(questions), **settings), tmp_path / "local").run() == {}
    given = (f"--release={release}", f"--data={questions}", "--max_new_tokens=2", "--batch_size=1", "--budgets=4")
    given += ("--reducers=none,fastv", f"--workdir={tmp_path / 'ray'}", "--executor=ray", f"--ray_address={hosts[0]}")
    process, results = start("evaluate", *given), tmp_path / "ray" / "results.jsonl"
    wait_for(results.exists, process)
    process.kill()
    process.communicate(timeout=60)
    (kept,) = results.read_text().splitlines()
    finish(start("evaluate", *given))
    assert results.read_text().splitlines()[0] == kept
    assert rows(tmp_path / "ray") == rows(tmp_path / "local")
    assert [row["label"] for row in rows(tmp_path / "ray")] == ["none@released", "fastv@4"]


def test_a_point_whose_loss_is_high_is_stopped_on_a_cluster(hosts, tmp_path):
    given = ("--config=tests/processes/ray_sweep.py:halving", f"--workdir={tmp_path}")
    finish(start("sweep", *given, "--only=pool@1"))
    kept = (tmp_path / "results.jsonl").read_text()
    errors = finish(start("sweep", *given, "--executor=ray", f"--ray_address={hosts[0]}"))
    said = "1 of 2 points were stopped by config.sweep.halving, as"
    assert f"{said} {tmp_path / 'stopped.jsonl'} says: still@1" in errors
    assert "was lost" not in errors and "Traceback" not in errors
    (stopped,) = map(json.loads, (tmp_path / "stopped.jsonl").read_text().splitlines())
    assert stopped["label"] == "still@1" and re.match("at step 20 with a loss of .*1 others", stopped["stopped"])
    assert len(steps(tmp_path, "still@1")) == 20 and len(steps(tmp_path, "pool@1")) == 60
    assert (tmp_path / "results.jsonl").read_text() == kept and len(rows(tmp_path)) == 1
    assert (tmp_path / "failed.jsonl").read_text() == ""


def test_tasks_of_one_host_have_chips_of_their_own(tmp_path):
    words = [sys.executable, "-m", "tests.processes.ray_chips"]
    given = {**environment(), **TOKEN, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    done = subprocess.run(words, cwd=ROOT, env=given, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]  # workers print too
    ended = {line["label"]: line for line in lines}
    assert done.returncode == 0 and len(ended) == 5, done.stderr
    assert "a point takes 2 of the 4 TPU chips of a host; 2 points of a host run at a time, 2 in all" in done.stderr
    seen = [ended[f"seen {number}"]["result"] for number in range(4)]
    assert {one["environment"]["TPU_VISIBLE_CHIPS"] for one in seen} == {"0,1", "2,3"}
    for one, other in itertools.combinations(seen, 2):
        if one["begun"] < other["ended"] and other["begun"] < one["ended"]:
            assert one["environment"]["TPU_VISIBLE_CHIPS"] != other["environment"]["TPU_VISIBLE_CHIPS"]
    for one in seen:
        assert not one["early"]
        told = {name: one["environment"][name] for name in ("JAX_PLATFORMS", "NPROC", "TPU_PROCESS_BOUNDS")}
        assert told == {"JAX_PLATFORMS": "tpu,cpu", "NPROC": "4", "TPU_PROCESS_BOUNDS": "1,1,1"}
        assert one["environment"]["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "1,2,1"
        assert one["environment"]["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "programs")
    order = list(ended)
    assert max(order.index("seen 0"), order.index("seen 3")) < order.index("failing")
    assert ended["failing"]["error"] == "ConfigError: no such key"


def test_a_cluster_that_cannot_be_reached_is_refused_before_anything_is_written(tmp_path):
    given = ("--config=tests/processes/ray_sweep.py", f"--workdir={tmp_path / 'work'}", "--executor=ray")
    process = start("sweep", *given, f"--ray_address=127.0.0.1:{free_port()}")
    _, errors = process.communicate(timeout=120)
    wanted = tried("no Ray cluster can be reached at {}: {}; start one there by `ray start ")
    assert process.returncode == 1 and re.search(wanted, errors), errors
    assert "Traceback" not in errors and not (tmp_path / "work").exists()

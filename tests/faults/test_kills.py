"""SIGKILL at random moments of steps and of saves, which overlap: each process saves after every step."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.conftest import first_device
from tests.faults.training import STEPS, trainer
from vlm_jax.train.lock import WorkdirInUse

ROOT = pathlib.Path(__file__).resolve().parents[2]


def started(workdir) -> subprocess.Popen:
    words = [sys.executable, "-m", "tests.faults.training", str(workdir)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def steps(workdir) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def curve(workdir) -> list[tuple]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def test_a_run_that_is_killed_at_any_moment_gives_the_unbroken_curve(trained, request, tmp_path):
    draw, workdir = random.Random(0), tmp_path / "run"
    for kill in range(request.config.getoption("--kills")):
        done = steps(workdir)
        if done >= STEPS - 2:  # near the end: another run
            finish(workdir, trained)
            workdir = tmp_path / f"run{kill}"
            done = 0
        process = started(workdir)
        while steps(workdir) <= done:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.001)
        if kill == 0:
            with pytest.raises(WorkdirInUse, match=f"{workdir} is in use by process {process.pid} on "):
                trainer(workdir, first_device()).run()
        time.sleep(draw.uniform(0, 0.2))  # a step and its save take about a tenth of a second
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    finish(workdir, trained)


def finish(workdir, trained) -> None:
    trainer(workdir, first_device()).run()
    assert curve(workdir) == curve(trained[0])
    assert not [path for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit()]

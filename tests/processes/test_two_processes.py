"""Two real processes of four devices each, one of which is asked to stop, killed and stopped, against one of eight."""

import json
import re
import signal
import socket
import subprocess
import sys

import numpy as np

from tests.processes.conftest import ROOT, environment, wait_for_step
from tests.processes.two_processes import STEPS

from ..advice import tried

MESH = ("--config.mesh.data=4", "--config.mesh.fsdp=2")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(workdir, devices: int, count: int = 1, index: int = 0, port: int = 0) -> subprocess.Popen:
    words = [sys.executable, "-m", "vlm_jax.cli.train", "--config=tests/processes/two_processes.py", *MESH]
    words += [f"--workdir={workdir}", "--compilation_cache="]
    if count > 1:
        words += ["--distributed", f"--coordinator_address=127.0.0.1:{port}"]
        words += [f"--num_processes={count}", f"--process_id={index}"]
    return subprocess.Popen(
        words, cwd=ROOT, env=environment(devices), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def losses(workdir) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def lost(process: subprocess.Popen, other: subprocess.Popen, index: int) -> int:
    """The step at which a process that ends says that the other one is lost."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert re.search(
        tried("has the cause; rerun the same command on all hosts to resume from the newest checkpoint"), errors
    )
    named = rf"HostLost: process {index} \(process id {other.pid} on {re.escape(socket.gethostname())}\)"
    found = re.search(
        rf"^{named} has given no sign of life for \d+ seconds, and was at step (\d+) then\. ", errors, re.M
    )
    assert found, errors
    return int(found[1])


def test_two_processes_stop_together_lose_one_go_on_and_give_the_losses_of_one(tmp_path):
    finish([start(tmp_path / "one", 8)])
    two = tmp_path / "two"

    def started(step: int) -> list[subprocess.Popen]:
        port = free_port()
        pair = [start(two, 4, 2, index, port) for index in range(2)]
        wait_for_step(two, step, pair[0])
        return pair

    pair = started(3)
    pair[1].send_signal(signal.SIGTERM)  # one of them is asked; both must save
    finish(pair)
    stopped = len(losses(two))
    assert 3 <= stopped < STEPS - 20

    pair = started(stopped + 2)
    pair[1].kill()
    assert stopped + 2 <= lost(pair[0], pair[1], 1) <= len(losses(two)) + 1
    broken = len(losses(two))

    pair = started(broken + 2)  # from the checkpoint before
    pair[0].send_signal(signal.SIGSTOP)  # the one that coordinates
    assert broken + 2 <= lost(pair[1], pair[0], 0) <= len(losses(two)) + 1
    pair[0].kill()
    pair[0].communicate(timeout=60)
    assert len(losses(two)) < STEPS

    finish(started(STEPS))
    curves = [losses(tmp_path / name) for name in ("one", "two")]
    assert [len(curve) for curve in curves] == [STEPS] * 2
    np.testing.assert_allclose(*curves, atol=1e-4)
    results = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")]
    assert [set(result["accuracy"]) for result in results] == [{"read", "transcribe", "count", "locate"}] * 2

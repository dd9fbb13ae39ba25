"""Two real processes of four devices each, against one process of eight."""

import json
import signal
import socket
import subprocess
import sys

import numpy as np

from tests.processes.conftest import ROOT, environment, wait_for_step

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


def test_two_processes_stop_together_go_on_and_give_the_losses_of_one(tmp_path):
    finish([start(tmp_path / "one", 8)])
    port = free_port()
    pair = [start(tmp_path / "two", 4, 2, index, port) for index in range(2)]
    wait_for_step(tmp_path / "two", 3, pair[0])
    pair[1].send_signal(signal.SIGTERM)  # one of them is asked; both must save
    finish(pair)
    stopped = len(losses(tmp_path / "two"))
    assert 3 <= stopped < 24

    port = free_port()
    finish([start(tmp_path / "two", 4, 2, index, port) for index in range(2)])
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 24
    np.testing.assert_allclose(two, one, atol=1e-4)
    results = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")]
    assert [set(result["accuracy"]) for result in results] == [{"read", "transcribe", "count", "locate"}] * 2

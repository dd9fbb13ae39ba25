"""Two real processes of four devices each, one of which is asked to stop, killed and stopped, against one of eight."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.processes.conftest import ROOT, environment, wait_for_step
from tests.processes.joined import finish, free_port, losses, lost, wait_for_beat
from tests.processes.two_processes import STEPS

MESH = ("--config.mesh.data=4", "--config.mesh.fsdp=2")


@pytest.fixture
def begun():
    """Processes that are killed after the test, however it ends."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(
    workdir, devices: int, count: int = 1, index: int = 0, port: int = 0, more: tuple[str, ...] = ()
) -> subprocess.Popen:
    words = [sys.executable, "-m", "vlm_jax.cli.train", "--config=tests/processes/two_processes.py", *MESH]
    words += [f"--workdir={workdir}", "--compilation_cache=", *more]
    if count > 1:
        words += ["--distributed", f"--coordinator_address=127.0.0.1:{port}"]
        words += [f"--num_processes={count}", f"--process_id={index}"]
    return subprocess.Popen(
        words, cwd=ROOT, env=environment(devices), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_stop_together_lose_one_go_on_and_give_the_losses_of_one(tmp_path, begun):
    begun.append(start(tmp_path / "one", 8))
    finish(begun)
    two = tmp_path / "two"

    def started(*more: str) -> list[subprocess.Popen]:
        port = free_port()
        for index in range(2):
            begun.append(start(two, 4, 2, index, port, more))
        return begun[-2:]

    pair = started()
    wait_for_step(two, 3, pair[0])
    pair[1].send_signal(signal.SIGTERM)  # one of them is asked; both must save
    finish(pair)
    done = len(losses(two))
    for other, sent in ((1, signal.SIGKILL), (0, signal.SIGSTOP)):  # process 0 coordinates
        pair = started("--config.loop.watchdog=8")
        wait_for_beat(two, done + 2, pair)
        pair[other].send_signal(sent)
        step, _ = lost(pair[1 - other], pair[other], other)
        assert done + 2 <= step <= len(losses(two)) + 1
        pair[other].kill()
        pair[other].communicate(timeout=60)
        done = len(losses(two))
    assert done < STEPS
    finish(started())
    curves = [losses(tmp_path / name) for name in ("one", "two")]
    assert [len(curve) for curve in curves] == [STEPS] * 2
    np.testing.assert_allclose(*curves, atol=1e-4)
    results = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")]
    assert [set(result["accuracy"]) for result in results] == [{"read", "transcribe", "count", "locate"}] * 2

"""What tests of several joined processes start them with, and see of them."""

import json
import pathlib
import re
import socket
import subprocess

from tests.processes.watching import wait_for

from ..advice import tried


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def losses(workdir) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def lost(process: subprocess.Popen, other: subprocess.Popen, index: int) -> tuple[int, int]:
    """The last step that a process that ends knows of the other one, and for how many seconds that was silent."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert re.search(
        tried("has the cause; rerun the same command on all hosts to resume from the newest checkpoint"), errors
    )
    named = rf"HostLost: process {index} \(process id {other.pid} on {re.escape(socket.gethostname())}\)"
    found = re.search(
        rf"^{named} has given no sign of life for (\d+) seconds, and was at step (\d+) then\. ", errors, re.M
    )
    assert found, errors
    return int(found[2]), int(found[1])


def wait_for_beat(workdir: pathlib.Path, step: int, processes: list[subprocess.Popen]) -> None:
    """Returns when the board says that all processes of a start are at a step, or later."""
    path = workdir / "heartbeats" / "all.json"

    def is_there() -> bool:
        text = path.read_text() if path.exists() else ""
        if not text.endswith("}"):  # it is being written
            return False
        beats = {beat["process"]: beat for beat in json.loads(text)["beats"]}
        return len(beats) == len(processes) and all(
            f"process id {process.pid} " in beats[index]["place"] and beats[index]["step"] >= step
            for index, process in enumerate(processes)
        )

    wait_for(is_there, processes[0])

"""What tests that stop sweeps and evaluations in the middle see of them."""

import json
import pathlib
import subprocess
import time

TIMES = ("step_seconds", "prefill_seconds", "decode_seconds", "seconds_per_sample")


def processes_of(process: subprocess.Popen) -> list[int]:
    """Ids of a process and all its descendants."""
    parents = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended
    found = [process.pid]
    for number in found:
        found += [child for child, parent in parents.items() if parent == number]
    return found


def wait_for(condition, process: subprocess.Popen | None = None, seconds: float = 120):
    """The first value of a condition that is true; an error if a process ends, or time is up, before it."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if process is not None and process.poll() is not None:
            raise AssertionError(process.communicate())
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def finish(process: subprocess.Popen) -> str:
    """Standard error of a command that has succeeded."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def rows(workdir: pathlib.Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def steps(workdir: pathlib.Path, label: str) -> list[str]:
    """Whole lines of a point's `metrics.jsonl`."""
    path = workdir / "points" / label / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def curve(lines: list[str]) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]

"""Copies of the state on hosts: one of four is killed, and loses its disk; the run resumes from those of the others."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.faults.hosts import COPY_EVERY, HOSTS, STEPS
from tests.processes.conftest import ROOT, environment, programs  # noqa: F401
from tests.processes.joined import finish, free_port, lost, wait_for_beat


@pytest.fixture
def begun():
    """Processes that are killed after the test, however it ends."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def started(begun, count: int, devices: int, *words: object) -> list[subprocess.Popen]:
    """So many processes of a module; `words` are its first arguments, before a port and the index."""
    port = free_port()
    for index in range(count):
        command = [sys.executable, "-m", *map(str, words), str(port), str(index)]
        more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        begun.append(subprocess.Popen(command, cwd=ROOT, env=environment(devices), **more))
    return begun[-count:]


def logged(workdir: pathlib.Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return lines


def curve(lines: list[dict]) -> list[tuple]:
    return [(line["loss"], line["grad_norm"]) for line in lines]


def test_a_run_resumes_from_the_copies_of_other_hosts_where_one_is_lost(tmp_path, begun):
    workdir, copies = tmp_path / "run", tmp_path / "copies"
    four = started(begun, HOSTS, 1, "tests.faults.hosts", workdir, copies)
    wait_for_beat(workdir, 2 * COPY_EVERY + 2, four)
    four[3].kill()
    for process in four[:3]:
        lost(process, four[3], 3)
    before = logged(workdir)
    assert not [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    hosts = sorted(copies.glob("*/*/*"))
    kept = [
        sorted(
            int(path.name) for path in (host / "copies").iterdir() if path.name.isdigit()
        )  # and not those unfinished
        for host in hosts
    ]
    assert len(kept) == HOSTS and kept[0] == [] and kept[1] and kept[2]
    newest = max(kept[1] + kept[2])
    assert 2 * COPY_EVERY <= newest <= len(before)
    shutil.rmtree(hosts[3])

    four = started(begun, HOSTS, 1, "tests.faults.hosts", workdir, copies)
    finish(four)
    after = logged(workdir)
    assert len(after) == STEPS and curve(after[: len(before)]) == curve(before)
    # Steps up to the copy have the lines, with their seconds, of the first start; the others were made again.
    assert [line == other for line, other in zip(after, before, strict=False)] == [
        line["step"] <= newest for line in before
    ]
    assert not [path for path in copies.rglob("*") if path.is_file()]  # of a finished run


def test_copies_have_the_values_of_the_state_and_one_that_differs_is_never_used(tmp_path, begun):
    for process in started(begun, 2, 2, "tests.faults.copying", tmp_path):
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        said = json.loads(out.splitlines()[-1])
        assert said["steps"] == [None, 5, None, 6]
        assert said["differing"] == [[], []]
        assert "the copy of step 7 on the hosts is damaged and was deleted: kernel: expected " in said["told"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

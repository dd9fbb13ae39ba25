"""Small releases trained by 2 and 4 real processes of two devices each, against one device of one process."""

import contextlib
import itertools
import json
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest

from tests.contracts import releases
from tests.processes.conftest import ROOT, environment
from tests.processes.joined import finish, free_port, losses, lost
from tests.scale.training import IMAGES, WATCHDOG, train, write
from vlm_jax.sharding.mesh import CONTEXT, DATA, EXPERT, FSDP, TENSOR
from vlm_jax.train.watchdog import HEARTBEATS

EXPERTS = {"deepseek_vl_v2"}
SAVED, KILLED = 6, 11  # every so many steps; in the middle of this one, long after the last save


def meshes(system: str, count: int) -> list[str]:
    """All axes by twos and by threes: two devices along each."""
    axes = [DATA, FSDP, TENSOR, CONTEXT, *([EXPERT] if system in EXPERTS else [])]
    return [",".join(f"{axis}=2" for axis in chosen) for chosen in itertools.combinations(axes, {2: 2, 4: 3}[count])]


class Case(NamedTuple):
    """A run of several processes."""

    system: str
    count: int
    mesh: str


CASES = [Case(system, count, mesh) for count in (2, 4) for system in IMAGES for mesh in meshes(system, count)]
CASES += [Case(system, 2, "tensor=4") for system in IMAGES]  # more devices than Qwen has key heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The releases by name, and their data."""
    made = tmp_path_factory.mktemp("folder")
    for system in IMAGES:
        (made / system).mkdir()
        releases.make(system, made / system)
    write(made)
    return made


@pytest.fixture(scope="module")
def one_device(folder, steps, tmp_path_factory):
    """`curves` of a system, trained once."""
    made = {}

    def of(system):
        if system not in made:
            workdir = tmp_path_factory.mktemp("one") / system
            train(folder, workdir, system, "data=1", steps)
            made[system] = curves(workdir)
            assert len(made[system][0]) == steps
        return made[system]

    return of


@pytest.fixture(scope="module")
def start():
    """Starts so many processes that do the same jobs together; they are killed at the end, however it comes."""
    begun: list[subprocess.Popen] = []

    def of(jobs, count, errors: Sequence[pathlib.Path] = ()) -> list[subprocess.Popen]:
        words, port = [sys.executable, "-m", "tests.scale.training", json.dumps(jobs), str(count)], str(free_port())
        made = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "text": True}
        for index in range(count):
            with contextlib.ExitStack() as stack:
                to = stack.enter_context(errors[index].open("w")) if errors else subprocess.PIPE
                begun.append(subprocess.Popen([*words, str(index), port], env=environment(2), stderr=to, **made))
        return begun[-count:]

    yield of
    for process in begun:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def workdirs(request, folder, start, steps, tmp_path_factory):
    """Workdirs of the chosen cases with so many processes, which train them one after another.

    Also the exit statuses of the processes, and what they wrote to stderr.
    """
    made = {}

    def of(count):
        if count not in made:
            given = [getattr(item, "callspec", None) for item in request.session.items]
            cases = [one.params["case"] for one in given if one is not None and "case" in one.params]
            root = tmp_path_factory.mktemp("workdirs")
            found = {case: root / case.system / case.mesh for case in cases if case.count == count}
            jobs = [job(folder, workdir, case.system, case.mesh, steps) for case, workdir in found.items()]
            errors = [root / f"{count}-{index}.txt" for index in range(count)]  # no pipe, which could fill up
            statuses = [process.wait(timeout=120 * len(jobs)) for process in start(jobs, count, errors)]
            made[count] = found, statuses, [path.read_text() for path in errors]
        return made[count]

    return of


def job(folder, workdir, system, mesh, steps, **more):
    return {"folder": str(folder), "workdir": str(workdir), "system": system, "mesh": mesh, "steps": steps, **more}


def curves(workdir) -> tuple[list[float], list[float], list[int]]:
    """Losses, norms of the gradient, and tokens."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return losses(workdir), [line["grad_norm"] for line in lines], [line["tokens"] for line in lines]


def assert_equal(workdir, expected):
    found = curves(workdir)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-3)
    assert found[2] == expected[2]


@pytest.mark.parametrize("case", [pytest.param(case, id="-".join(map(str, case))) for case in CASES])
def test_steps_are_those_of_one_device(case, workdirs, one_device):
    found, statuses, said = workdirs(case.count)
    assert (found[case] / "metrics.jsonl").exists(), said
    assert_equal(found[case], one_device(case.system))
    assert statuses == [0] * case.count, said


@pytest.mark.parametrize("system", IMAGES)
def test_a_run_whose_process_was_killed_goes_on_with_as_many_and_with_fewer(
    system, folder, start, steps, one_device, tmp_path
):
    wide = "fsdp=2,tensor=2,expert=2" if system in EXPERTS else "data=2,fsdp=2,tensor=2"
    given = folder, tmp_path / "run", system, wide, steps
    *others, victim = start([job(*given, killed=[3, KILLED], save_every=SAVED, log_every=1)], 4)
    victim.communicate(timeout=300)
    assert victim.returncode == -signal.SIGKILL
    beat = json.loads((tmp_path / "run" / HEARTBEATS / "3.json").read_text())["step"]  # the victim's last
    for process in others:
        step, seconds = lost(process, victim, 3)
        assert step == beat and seconds <= WATCHDOG
    assert max(beat, KILLED) - 1 <= len(losses(tmp_path / "run")) < steps
    for count, mesh in ((4, wide), (2, "fsdp=2,context=2"), (1, "data=1")):
        workdir = shutil.copytree(tmp_path / "run", tmp_path / str(count))
        again = job(folder, workdir, system, mesh, steps, save_every=SAVED)
        finish(start([again], count)) if count > 1 else train(**again)
        assert_equal(workdir, one_device(system))

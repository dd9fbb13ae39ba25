"""Small releases trained by 2 and 4 real processes of two devices, against one process of one device."""

import subprocess
import sys

import numpy as np
import pytest

from tests.contracts import releases
from tests.processes.conftest import ROOT, environment
from tests.processes.joined import finish, free_port, losses, lost, wait_for_beat
from tests.scale.training import STEPS, SYSTEMS, write

MESHES = {
    2: ["data=4", "fsdp=4", "data=2,fsdp=2", "fsdp=2,tensor=2", "fsdp=2,context=2", "tensor=2,context=2"],
    4: ["data=2,fsdp=2,tensor=2", "data=2,tensor=2,context=2", "fsdp=4,context=2"],
}
OF_EXPERTS = {2: ["fsdp=2,expert=2", "tensor=2,expert=2"], 4: ["data=2,fsdp=2,expert=2", "fsdp=2,context=2,expert=2"]}
CASES = [(system, count, mesh) for system in SYSTEMS for count in MESHES for mesh in MESHES[count]]
CASES += [("deepseek_vl_v2", count, mesh) for count in OF_EXPERTS for mesh in OF_EXPERTS[count]]


def start(folder, workdir, mesh, count=1) -> list[subprocess.Popen]:
    words, port = [sys.executable, "-m", "tests.scale.training", str(folder), str(workdir), mesh], free_port()
    made = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    env = environment(2 if count > 1 else 1)
    return [subprocess.Popen([*words, str(count), str(index), str(port)], env=env, **made) for index in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Of a system: its folder, and the losses of one device, trained once."""
    made = {}

    def of(system):
        if system not in made:
            folder = tmp_path_factory.mktemp(system)
            (folder / "release").mkdir()
            releases.make(system, folder / "release")
            (folder / "system").write_text(system)
            write(folder)
            finish(start(folder, folder / "one", "data=1"))
            made[system] = folder, losses(folder / "one")
            assert len(made[system][1]) == STEPS and made[system][1][-1] < made[system][1][0]
        return made[system]

    return of


@pytest.mark.parametrize(("system", "count", "mesh"), CASES)
def test_losses_are_those_of_one_device(trained, tmp_path, system, count, mesh):
    folder, expected = trained(system)
    finish(start(folder, tmp_path / "run", mesh, count))
    np.testing.assert_allclose(losses(tmp_path / "run"), expected, atol=1e-4)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_that_lost_a_process_goes_on_with_fewer_to_the_same_losses(trained, tmp_path, system):
    folder, expected = trained(system)
    workdir, done = tmp_path / "run", 0
    for count, mesh in ((4, "fsdp=4,tensor=2"), (2, "fsdp=2,tensor=2")):
        processes = start(folder, workdir, mesh, count)
        wait_for_beat(workdir, count - 1, done + 1, processes[-1])
        processes[-1].kill()
        assert {lost(one, processes[-1], count - 1) for one in processes[:-1]} <= set(range(done + 1, STEPS))
        done = len(losses(workdir))
        assert done < STEPS
    finish(start(folder, workdir, "data=1"))
    np.testing.assert_allclose(losses(workdir), expected, atol=1e-4)

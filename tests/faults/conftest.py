"""A trained run, and how many faults are tried: a sample, or as many as `make faults` says."""

import jax
import pytest

from tests.faults.training import trainer


def pytest_addoption(parser):
    parser.addoption("--flips", type=int, default=1, help="single-bit flips for each file of a checkpoint")
    parser.addoption("--kills", type=int, default=2, help="times that a run is killed")


def first_device():
    from vlm_jax.sharding.mesh import MeshSettings, make_mesh  # here, where jaxtyping's checks are switched on

    return make_mesh(MeshSettings(data=1), jax.devices()[:1])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The workdir of a whole run, which every test leaves as it is, and its trainer."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    found = trainer(workdir, first_device())
    found.run()
    return workdir, found

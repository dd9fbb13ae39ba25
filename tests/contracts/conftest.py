"""The mesh that the contract tests share."""

import pytest

from vlm_jax.sharding.mesh import MeshSettings, make_mesh


@pytest.fixture(scope="session")
def mesh():
    """Eight devices: two each for data, fsdp and tensor."""
    return make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))

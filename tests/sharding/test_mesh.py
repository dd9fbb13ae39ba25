"""The mesh takes every device, or says what does not fit."""

import jax
import pytest

from vlm_jax.config import ConfigError
from vlm_jax.sharding.mesh import MeshSettings, make_mesh


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (8, 1, 1, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1, 1, 1)),
        ({"data": 1, "tensor": -1}, (1, 1, 8, 1, 1)),
        ({"data": 2, "context": 2, "expert": 2}, (2, 1, 1, 2, 2)),
    ],
)
def test_what_is_left_goes_to_the_free_axis(sizes, expected):
    mesh = make_mesh(MeshSettings(**sizes))
    assert mesh.axis_names == ("data", "fsdp", "tensor", "context", "expert")
    assert mesh.devices.shape == expected
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_part_of_the_devices():
    devices = jax.devices()[2:5]
    assert list(make_mesh(MeshSettings(), devices).devices.flat) == devices


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, "is not the number of devices, 8"),
        ({"data": 2, "tensor": 2}, "is not the number of devices, 8"),
        ({"data": 16}, "is not the number of devices, 8"),
        ({"fsdp": -1}, "at most one -1"),
        ({"fsdp": 0}, "expected at least 1, or -1, got 0"),
        ({"data": 8, "fsdp": -2}, "expected at least 1, or -1, got -2"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(ConfigError, match=f"config.mesh(.fsdp)?: .*{message}"):
        make_mesh(MeshSettings(**sizes))

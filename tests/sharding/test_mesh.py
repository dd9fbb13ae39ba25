"""The mesh takes every device, or says what does not fit."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from vlm_jax.config import ConfigError
from vlm_jax.planner.topology import open_topology
from vlm_jax.sharding.mesh import MeshSettings, make_generation_mesh, make_mesh, parse_generation_mesh

from ..advice import tried


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


def test_an_axis_may_be_a_part_of_a_torus_dimension():
    """2 of 4 chips in a row share a layer; `jax.make_mesh` refuses it on a v5p."""
    chips = open_topology("v5p:4x4x4").devices
    found = make_mesh(MeshSettings(tensor=2), chips).devices
    assert found.shape == (32, 1, 2, 1, 1) and set(found.flat) == set(chips)
    apart = [np.abs(np.subtract(a.coords, b.coords)).sum() for a, b in found.reshape(32, 2)]
    assert apart == [1] * 32


class Chip(SimpleNamespace):
    """What a mesh reads of a device: two slices of four GPUs."""

    __hash__ = object.__hash__


def test_between_slices_are_copies_of_the_model():
    chips = [
        Chip(id=i, slice_index=i // 4, process_index=i // 4, platform="gpu", device_kind="H200", client=None)
        for i in range(8)
    ]
    sizes = {"data": 4, "tensor": 2}
    with pytest.raises(ConfigError, match=tried("got {1}; set it to {2}, or to a multiple of it")):
        make_mesh(MeshSettings(data=1, fsdp=8), chips)
    placed = make_mesh(MeshSettings(**sizes), chips).devices
    assert placed.shape == (4, 1, 2, 1, 1)
    slices = [[chip.slice_index for chip in row] for row in placed.reshape(4, 2)]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tensor:4", (2, 1, 4, 1, 1)),
        ("tensor:2,data:4", (4, 1, 2, 1, 1)),
        ("tensor:2+fsdp:4", (1, 4, 2, 1, 1)),
        ("fsdp:-1", (1, 8, 1, 1, 1)),
        ("expert:2, tensor:-1", (1, 1, 4, 1, 2)),
    ],
)
def test_a_mesh_in_words(text, expected):
    assert make_generation_mesh(text, "--mesh").devices.shape == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor=4", "expected axes with their devices, once each, as tensor:4,data:2, got 'tensor=4'"),
        ("", "expected axes with their devices"),
        ("tensor:2,tensor:4", "once each"),
        ("tensor:two", "expected axes with their devices"),
        ("tensr:2", "did you mean 'tensor'?"),
        ("tensor:3", "is not the number of devices, 8"),
        ("tensor:0", "expected at least 1, or -1, got 0"),
    ],
)
def test_words_that_name_no_mesh(text, message):
    with pytest.raises(ConfigError, match="--mesh") as error:
        make_generation_mesh(text, "--mesh")
    assert message in str(error.value)


def test_words_are_read_where_the_devices_are_not():
    assert parse_generation_mesh("tensor:16", "--mesh") == MeshSettings(data=-1, tensor=16)
    assert parse_generation_mesh("tensor:-1", "--mesh") == MeshSettings(data=1, tensor=-1)


def test_generation_does_not_shard_the_sequence():
    with pytest.raises(ConfigError, match=tried("leave {context} out, got '{}'")):
        parse_generation_mesh("context:2,tensor:4", "--mesh")
    assert make_generation_mesh("tensor:4", "--mesh").shape["context"] == 1

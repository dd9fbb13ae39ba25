"""Names of slices, and what is said without the compiler."""

import importlib.util

import pytest

from vlm_jax.config import ConfigError
from vlm_jax.planner.topology import PlanError, open_topology, parse_topology

from ..advice import tried


def test_names_have_a_kind_and_its_sides():
    assert parse_topology("v5p:4x4x4") == ("v5p", (4, 4, 4))
    assert parse_topology("tpu7x:2x2x1") == ("7x", (2, 2, 1))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e", "expected KIND"),
        ("v5e:4", "expected KIND"),
        ("v5ee:4x4", "did you mean 'v5e'"),
        ("v5e:4x4x4", "a slice of v5e has 2 sides, as v5e:4x4"),
        ("v5p:4x4", "a slice of v5p has 3 sides, as v5p:4x4x4"),
        ("v5p:0x4x4", "3 sides"),
    ],
)
def test_another_name_is_refused(name, said):
    with pytest.raises(ConfigError, match=said):
        parse_topology(name)


def test_slices_have_the_devices_of_their_chips():
    for name, count, chip in (("v4:2x2x1", 4, "v4"), ("v6e:2x4", 8, "v6e"), ("7x:2x2x1", 8, "7x")):
        topology = open_topology(name)
        assert len(topology.devices) == count and topology.chip.name == chip
    with pytest.raises(PlanError, match="no such slice"):
        open_topology("v5e:3x3")


def test_without_the_compiler_its_installation_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        PlanError,
        match=tried("install libtpu, the compiler of TPUs, which runs on any CPU: pip install 'vlm_jax[plan]'"),
    ):
        open_topology("v5e:2x2")
    monkeypatch.undo()  # as installed
    assert len(open_topology("v5e:2x2").devices) == 4

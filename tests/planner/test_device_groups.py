"""Groups of devices in all forms that XLA writes, and their mesh axes."""

import pytest

from vlm_jax.planner.device_groups import axes_of, axes_of_pairs, device_groups, device_pairs
from vlm_jax.planner.program_text import UnreadableProgram

MESH = {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("attributes", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}, channel_id=1", ("tensor",)),
        ("replica_groups=[8,2]<=[16]", ("tensor",)),
        (", channel_id=3, replica_groups=[2,8]<=[16], dimensions={0}", ("fsdp", "tensor")),
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'b'}, use_global_device_ids=true", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=8] {'a'}", ("data",)),
        ("replica_groups=mesh['a'=4,'b'=4], device_ids=([2,4,2]T(1,0,2)) {'a'}", ("fsdp",)),
        ("replica_groups=mesh['a'=4,'b'=4], device_ids=([2,4,2]T(1,0,2)) {'b'}, channel_id=1", ("data", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'a'}", ("tensor",)),
        ("replica_groups=[1,16]<=[16]", ("data", "fsdp", "tensor")),
        ("replica_groups={}, channel_id=1", ("data", "fsdp", "tensor")),
        ("replica_groups={{0,3},{1,2}}", ()),
    ],
)
def test_groups_lie_along_mesh_axes(attributes, axes):
    assert axes_of(device_groups(attributes, 16), MESH) == axes


@pytest.mark.parametrize(
    "given",
    [
        "mesh['a'=2,'b'=8] {'b':(2)4}",
        "mesh['a'=2,'b'=8], device_ids=([8,2]T(1,2)) {'a'}",
        "mesh['a'=2,'b'=8], device_ids=([4,2]T(1,0)) {'a'}",
        "[4,4]<=[2,4,2]T(0,2)",
        "mesh['a'=2,'b'=4] {'a'}",
        "mesh['a'=2,'b'=8] {'c'}",
        "[8,2]<=[4,4]T(1,0)+1",
        "[4,2]<=[8]",
        "{{0,1},{2,x}}",
    ],
)
def test_other_forms_are_refused(given):
    with pytest.raises(UnreadableProgram, match="unknown groups of 16 devices"):
        device_groups(f"channel_id=1, replica_groups={given}, dimensions=" + "{0}", 16)


@pytest.mark.parametrize(
    ("given", "pairs", "axes"),
    [
        ("{{0,2},{2,4},{4,6},{6,0}}", [(0, 2), (2, 4), (4, 6), (6, 0)], ("fsdp",)),
        ("{{0,4},{4,0},{1,1}}", [(0, 4), (4, 0)], ("fsdp",)),
        ("{{0,0},{1,3}}", [(1, 3)], ("fsdp",)),
        ("{{0,3}}", [(0, 3)], ("fsdp", "tensor")),
        ("{{0,0},{1,1}}", [], ("data",)),
    ],
)
def test_pairs_are_those_of_different_devices(given, pairs, axes):
    found = device_pairs(f"channel_id=1, source_target_pairs={given}, metadata=" + "{}")
    assert found == pairs and axes_of_pairs(found, MESH) == axes
    with pytest.raises(UnreadableProgram, match="unknown pairs"):
        device_pairs("source_target_pairs={{0,1},{a}}")

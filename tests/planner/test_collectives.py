"""Bytes of collectives against a simulation of rings, and their groups in all forms that XLA writes."""

import pytest

from vlm_jax.costs.chips import chip_of
from vlm_jax.planner.collectives import Collective, axes_of, device_groups, exposed_seconds, sent_bytes

MESH = {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize("size", [2, 4, 8])
def test_rings_send_their_closed_forms(size):
    """Reduce-scatter: size - 1 steps of a part each; all-gather the same of the result; all-reduce both."""
    whole = 1024.0
    steps = [whole / size] * (size - 1)
    assert sent_bytes("reduce-scatter", whole, size) == pytest.approx(sum(steps))
    assert sent_bytes("all-gather", whole / size, size) == pytest.approx(sum(steps))
    assert sent_bytes("all-reduce", whole, size) == pytest.approx(2 * sum(steps))
    assert sent_bytes("all-to-all", whole, size) == pytest.approx(sum(whole / size for _ in range(size - 1)))


@pytest.mark.parametrize(
    ("attributes", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}", ("tensor",)),
        ("replica_groups=[8,2]<=[16]", ("tensor",)),
        ("replica_groups=[2,8]<=[16]", ("fsdp", "tensor")),
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'b'}, device_ids", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=8] {'a'}", ("data",)),
        ("replica_groups=[1,16]<=[16]", ("data", "fsdp", "tensor")),
        ("source_target_pairs={{0,2},{2,4},{4,6},{8,10},{10,12},{12,14}}", ("fsdp",)),
        ("replica_groups={{0,3},{1,2}}", ()),
    ],
)
def test_groups_lie_along_mesh_axes(attributes, axes):
    assert axes_of(device_groups(attributes, 16), MESH) == axes


def test_only_what_no_computation_hides_is_exposed():
    chip = chip_of("TPU v5 lite")
    sent = 2 * chip.link_bandwidth  # a second on one ring in both directions

    def moved(hidden, computation):
        return Collective("all-gather", ("fsdp",), 4, sent, 3, hidden, "", computation)

    assert moved(False, "a").seconds(chip) == pytest.approx(3)
    found = [moved(False, "a"), moved(True, "a"), moved(True, "b")]
    assert exposed_seconds(found, {"a": 10.0, "b": 1.0}, chip) == pytest.approx(3 + 0 + 2)

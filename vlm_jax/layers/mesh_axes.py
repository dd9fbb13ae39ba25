"""Mesh axes of logical names, for code that runs on every device by itself (`jax.shard_map`)."""

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from vlm_jax.types import Tree


def active_mesh() -> AbstractMesh | None:
    """The mesh of several devices that is set together with rules for logical names; None where arrays are whole.

    Inside a `jax.shard_map` over all axes every device has its own arrays, so there is none either.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or not nn.get_logical_axis_rules() or mesh.are_all_axes_manual:
        return None
    return mesh


def spec_of(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The mesh axes of the names; a dimension that they do not divide is not sharded."""
    entries = []
    wanted: Tree = nn.logical_to_mesh_axes(names)
    for entry, size in zip(wanted, shape, strict=True):
        entries.append(None if size % num_shards(entry, mesh) else entry)
    return PartitionSpec(*entries)


def num_shards(entry: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    """Devices over which one entry of a `PartitionSpec` divides a dimension."""
    count = 1
    for axis in entry if isinstance(entry, tuple) else (entry,) if entry else ():
        count *= mesh.shape[axis]
    return count

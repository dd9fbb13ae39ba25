"""Rules from logical axes to mesh axes; the first applicable rule of a name is used."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from vlm_jax import axes
from vlm_jax.sharding.mesh import CONTEXT, DATA, EXPERT, FSDP, TENSOR
from vlm_jax.types import Params, Tree

MeshAxes = str | tuple[str, ...] | None

RULES: dict[str, MeshAxes] = {
    # Parameters: the wide axis over `tensor`, the residual one over `fsdp`.
    axes.LAYERS: None,
    axes.EMBED: FSDP,
    axes.MLP: TENSOR,
    axes.HEADS: TENSOR,
    axes.KV_HEADS: TENSOR,
    axes.HEAD_DIM: None,
    axes.VOCAB: TENSOR,
    axes.POSITION: None,
    axes.QUERY: None,
    axes.PATCH: None,
    axes.CHANNELS_IN: None,
    axes.CLASSES: None,
    axes.EXPERT: EXPERT,
    axes.LATENT: None,
    axes.RANK: None,
    axes.NORM: None,
    # Activations.
    axes.BATCH: (DATA, FSDP),
    axes.LENGTH: CONTEXT,
    axes.ACTIVATION_EMBED: None,
}

BATCH_AXES = (DATA, FSDP)


def partition_spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Mesh axes for one array.

    A mesh axis shards only one dimension, the first whose rule has it; a dimension that the mesh
    axis does not divide is not sharded, since XLA shards evenly.

    Raises:
      KeyError: a logical name without a rule.
    """
    taken: set[str] = set()
    entries: list[MeshAxes] = []
    for name, size in zip(names, shape, strict=True):
        wanted = RULES[name] if name is not None else None
        group = (wanted,) if isinstance(wanted, str) else wanted or ()
        count = 1
        for axis in group:
            count *= mesh.shape[axis]
        if not group or taken & set(group) or size % count:
            entries.append(None)
        else:
            taken |= set(group)
            entries.append(wanted)
    return PartitionSpec(*entries)


def shardings(boxed: Tree, mesh: Mesh) -> Tree:
    """A NamedSharding for every leaf of a tree whose leaves have logical names.

    Args:
      boxed: shapes (or arrays) from `init`, in Flax's `LogicallyPartitioned` boxes;
        a leaf without a box, such as a step counter, is replicated.
      mesh: the mesh of the run.
    """

    def of(leaf):
        if isinstance(leaf, nn.LogicallyPartitioned):
            if not jax.tree.leaves(leaf.value):  # leaves that an optimizer masks
                return leaf.value
            return NamedSharding(mesh, partition_spec(leaf.names, leaf.value.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(of, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def placed(boxed: Tree, mesh: Mesh) -> Tree:
    """Shape, dtype and sharding of every leaf of a boxed tree of shapes."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings(boxed, mesh),
    )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Sets the mesh and the rules for tracing, so that activations' constraints take effect.

    `with mesh:` is not enough: Flax's logical constraints are silent no-ops under it.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(RULES.items())):
        yield


def mesh_of(params: Params) -> Mesh | None:
    """The mesh of the parameters; None where they are on one device."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)  # NumPy arrays have none
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def generation_mesh(params: Params) -> Mesh | None:
    """The mesh of parameters, where they generate on it: not where it shards the sequence."""
    mesh = mesh_of(params)
    return None if mesh is None or mesh.shape[CONTEXT] > 1 else mesh


def replicated(function: Callable[..., Tree], mesh: Mesh | None) -> Callable[..., Tree]:
    """Compiles a function whose result every process holds whole.

    Args:
      function: of parameters and host arrays, which are the same in every process.
      mesh: of the parameters; None where they are on one device.
    """
    if mesh is None:
        return jax.jit(function)
    return in_mesh(jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec())), mesh)


def in_mesh(function: Callable[..., Tree], mesh: Mesh | None) -> Callable[..., Tree]:
    """A compiled function that is traced and called under `use_mesh`; the function itself where `mesh` is None.

    Without it kernels that the compiler cannot partition, such as Mosaic's of attention, fail on sharded parameters.
    """
    if mesh is None:
        return function

    def call(*arguments: Tree) -> Tree:
        with use_mesh(mesh):
            return function(*arguments)

    return call


@dataclasses.dataclass(frozen=True)
class BatchShards:
    """How the rows of a batch are divided over the devices of a mesh, as one process sees it.

    Attributes:
      count: shards of equally many consecutive rows, numbered from 0.
      own: numbers of those that are on devices of this process, in order. Where other axes of the mesh span
        processes, several processes have the same ones.
      counted: for each of `own`, whether this process is the first that has it.
    """

    count: int
    own: tuple[int, ...]
    counted: tuple[bool, ...]


@functools.lru_cache(maxsize=8)
def batch_shards(mesh: Mesh) -> BatchShards:
    """The shards of a batch on a mesh."""
    places = [mesh.axis_names.index(name) for name in BATCH_AXES]
    devices = np.moveaxis(mesh.devices, places, range(len(places)))
    count, mine = math.prod(devices.shape[: len(places)]), jax.process_index()
    holders = [{device.process_index for device in group} for group in devices.reshape(count, -1)]
    own = tuple(number for number, processes in enumerate(holders) if mine in processes)
    return BatchShards(count, own, tuple(mine == min(holders[number]) for number in own))


def distribute(batch: Tree, mesh: Mesh) -> Tree:
    """Puts this process's rows of a batch, those of `batch_shards(mesh).own`, on its devices.

    Args:
      batch: leaves [b, ...] with equally many rows of each of these shards, in their order.
      mesh: of the run.

    Returns:
      The global batch, leaves [B, ...].
    """
    sharding, shards = NamedSharding(mesh, PartitionSpec(BATCH_AXES)), batch_shards(mesh)
    if jax.process_count() == 1:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), batch)

    def whole(leaf: np.ndarray) -> jax.Array:
        size = len(leaf) // len(shards.own)

        def rows(index: tuple[slice, ...] | None) -> np.ndarray:
            start = index[0].start if index else None
            first = shards.own.index((start or 0) // size) * size
            return leaf[first : first + size]

        return jax.make_array_from_callback((size * shards.count, *leaf.shape[1:]), sharding, rows)

    return jax.tree.map(whole, batch)


def counted_rows(batch: Tree, mesh: Mesh) -> Tree:
    """The rows of this process's part of a batch that no earlier process has too; numbers of all add up to the batch's.

    Args:
      batch: as of `distribute`.
      mesh: of the run.
    """
    counted = batch_shards(mesh).counted
    if all(counted):
        return batch
    return jax.tree.map(lambda leaf: leaf[np.repeat(counted, len(leaf) // len(counted))], batch)

"""Rules from logical axes to mesh axes; the first applicable rule of a name is used."""

import contextlib
from collections.abc import Callable, Iterator

import jax
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


def replicated(function: Callable[..., Tree], mesh: Mesh | None) -> Callable[..., Tree]:
    """Compiles a function whose result every process holds whole.

    Args:
      function: of parameters and host arrays, which are the same in every process.
      mesh: of the parameters; None where they are on one device.
    """
    if mesh is None:
        return jax.jit(function)
    compiled = jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def call(*arguments: Tree) -> Tree:
        with use_mesh(mesh):
            return compiled(*arguments)

    return call


def distribute(batch: Tree, mesh: Mesh) -> Tree:
    """Puts this process's rows of a batch on its devices; the result is the global batch."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

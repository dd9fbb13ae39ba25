"""Runs an attention kernel on every device with its own rows and heads.

JAX partitions neither a Pallas kernel nor a loop by itself. The backward pass is a second `shard_map` over residuals
that never leave their device: transposing the first one would sum the gradients over all mesh axes by which an array is
not divided, although every device along them computes the same.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.layers.mesh_axes import active_mesh, num_shards, spec_of
from vlm_jax.types import Tree

Arrays = tuple[jax.Array, jax.Array, jax.Array]  # queries, keys and values
Kernel = Callable[..., jax.Array]  # of queries, keys, values and others, as one device has them


class Shards(NamedTuple):
    """How the mesh divides sequences.

    Attributes:
      axis: the mesh axis; None where sequences are whole.
      size: number of shards.
    """

    axis: str | None
    size: int


def context_shards() -> Shards:
    """How the active mesh divides sequences."""
    mesh = active_mesh()
    axis = None if mesh is None else spec_of((axes.LENGTH,), (0,), mesh)[0]
    if mesh is None or not isinstance(axis, str) or mesh.shape[axis] == 1:
        return Shards(None, 1)
    return Shards(axis, mesh.shape[axis])


def partitioned(
    kernel: Kernel,
    query: Float[Array, "B T Q H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    others: Tree,
    *,
    unit: int | None = None,
) -> Float[Array, "B T Q V"]:
    """Runs `kernel` over the mesh, divided by batch and heads; where the mesh does not divide them, they are whole.

    Args:
      kernel: of the arrays that one device has; differentiable there with respect to the first three.
      query: queries.
      key: keys.
      value: values.
      others: a tree of integers [B, .., T or S].
      unit: also divides positions, into shards of a multiple of this many; None leaves sequences whole.
    """
    mesh = active_mesh()
    if mesh is None:
        return kernel(query, key, value, others)
    key, value = (_with_heads_for(mesh, x, query.shape[2]) for x in (key, value))
    names = (axes.BATCH, axes.LENGTH if unit else None)
    batch, length = spec_of(names, (query.shape[0], query.shape[1] // (unit or 1)), mesh)
    heads = spec_of((axes.KV_HEADS,), (key.shape[2],), mesh)[0]
    specs = jax.tree.map(lambda x: PartitionSpec(batch, *[None] * (x.ndim - 2), length), others)
    return _on_devices(kernel, mesh, PartitionSpec(batch, length, heads, None), specs)((query, key, value), others)


def _with_heads_for(mesh: AbstractMesh, x: Float[Array, "B S K H"], num_queries: int) -> Float[Array, "B S _ H"]:
    """Keys or values, repeated where the mesh divides the query heads and not these."""
    shards = num_shards(spec_of((axes.HEADS,), (0,), mesh)[0], mesh)
    counts = [count for count in range(x.shape[2], num_queries + 1, x.shape[2]) if num_queries % count == 0]
    count = next((count for count in counts if count % shards == 0), x.shape[2])
    return x if count == x.shape[2] else jnp.repeat(x, count // x.shape[2], axis=2)


def _on_devices(
    kernel: Kernel, mesh: AbstractMesh, spec: PartitionSpec, specs: Tree
) -> Callable[[Arrays, Tree], jax.Array]:
    own = PartitionSpec(mesh.axis_names)  # a leading axis of devices, for what each keeps to itself

    def over_mesh(function: Callable[..., Tree], in_specs: Tree, out_specs: Tree) -> Callable[..., Tree]:
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    @jax.custom_vjp
    def apply(arrays: Arrays, others: Tree) -> jax.Array:
        return over_mesh(lambda arrays, others: kernel(*arrays, others), (spec, specs), spec)(arrays, others)

    def forward(arrays: Arrays, others: Tree) -> tuple[jax.Array, Tree]:
        def on_device(arrays: Arrays, others: Tree) -> tuple[jax.Array, Tree]:
            out, pull = jax.vjp(lambda *arrays: kernel(*arrays, others), *arrays)
            return out, jax.tree.map(lambda leaf: leaf[None], pull)

        return over_mesh(on_device, (spec, specs), (spec, own))(arrays, others)

    def backward(pull: Tree, gradient: jax.Array) -> tuple[Arrays, None]:
        def on_device(pull: Tree, gradient: jax.Array) -> Arrays:
            return jax.tree.map(lambda leaf: leaf[0], pull)(gradient)

        return over_mesh(on_device, (own, spec), spec)(pull, gradient), None

    apply.defvjp(forward, backward)
    return apply

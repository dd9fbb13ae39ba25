"""Work on the rows of a batch that stays on the device of each row.

The partitioner of XLA chooses by the sizes of arrays: where kernels are larger than activations it divides activations
by their width, and it computes a top-k, and gathers and scatters with computed indices, for whole batches.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from vlm_jax import axes
from vlm_jax.layers.mesh_axes import active_mesh, num_shards, spec_of

Tables = TypeVar("Tables", bound=tuple[Shaped[Array, "B ..."], ...])
Given = ParamSpec("Given")
Result = TypeVar("Result")


def local_rows(tables: Tables, index: Int[Array, "B T"]) -> Tables:
    """Rows of tables, `table[b, index[b, t]]` [B, T, ..]; a device of a mesh reads and writes only its own.

    Where the mesh divides positions too, every device of a row has all of its tables, whose gradients are summed over
    these devices.

    Args:
      tables: any number of arrays [B, R, ..].
      index: from 0 to R - 1.
    """

    def take(tables: Tables, index: jax.Array) -> Tables:
        return jax.tree.map(lambda table: _take(table, index), tables)

    mesh = active_mesh()
    if mesh is None:
        return take(tables, index)
    batch, length = spec_of((axes.BATCH, axes.LENGTH), index.shape, mesh)
    rows = PartitionSpec(batch, length if num_shards(length, mesh) > 1 else None)  # else no gradient is to be summed
    return jax.shard_map(take, mesh=mesh, in_specs=(PartitionSpec(batch), rows), out_specs=rows)(tables, index)


def interpolated_rows(
    table: Float[Array, "B R D"], index: Int[Array, "B T K"], weights: Float[Array, "B T K"]
) -> Float[Array, "B T D"]:
    """Weighted means of K rows of a table each, summed in float32, in the table's dtype; see `local_rows`.

    Args:
      table: of every row of the batch.
      index: from 0 to R - 1.
      weights: of the rows.
    """
    total = jnp.zeros((), jnp.float32)
    for number in range(index.shape[-1]):  # one after another, so that only one gathered copy is held
        (rows,) = local_rows((table,), index[..., number])
        total = total + weights[..., number, None] * rows.astype(jnp.float32)
    return total.astype(table.dtype)


def _take(table: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, index.reshape(*index.shape, *(1,) * (table.ndim - 2)), axis=1)


def row_by_row(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function that every device of a mesh runs on its own rows of the batch.

    Args:
      function: of positional arrays, whose first axis is the batch, as that of its results, and of static keywords; no
        row depends on another one.
    """

    @functools.wraps(function)
    def run(*arrays: Any, **static: Any) -> Any:
        mesh, whole = active_mesh(), functools.partial(function, **static)
        if mesh is None:
            return whole(*arrays)
        rows = spec_of((axes.BATCH,), arrays[0].shape[:1], mesh)
        return jax.shard_map(whole, mesh=mesh, in_specs=rows, out_specs=rows)(*arrays)

    return run


def on_own_device(x: Shaped[Array, "B N D"]) -> Shaped[Array, "B N D"]:
    """The activations, divided over the mesh by rows and positions, and not by their width."""
    mesh = active_mesh()
    if mesh is None:
        return x
    spec = spec_of((axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED), x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, spec)

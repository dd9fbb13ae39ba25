"""Products of rows with the kernel of their own group: what every expert does to the tokens that it was given.

| platform | implementation |
|---|---|
| TPU, GPU | `ragged`: `jax.lax.ragged_dot`, whose kernels read the groups' sizes |
| CPU | `blocks`: a loop over blocks of rows of one group, with that group's kernel |

XLA's CPU backend takes the ragged product of every row with every kernel, and masks what it does not want.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.layers.attention import is_written_out

Implementation = Literal["ragged", "blocks"]
Dot = Callable[[jax.Array, jax.Array], jax.Array]  # (rows, kernels of all groups)

_ROWS = 64  # of a block at most: enough for a matrix product to run at full speed
_TPU_ROWS = 8  # XLA takes its grouped kernel for a multiple of as many rows, and else every kernel with every row


def choose_implementation() -> Implementation:
    """That of the default platform; `ragged` where products are to be seen and counted."""
    return "blocks" if jax.default_backend() == "cpu" and not is_written_out() else "ragged"


def by_group(
    function: Callable[[jax.Array, Dot], jax.Array],
    rows: Float[Array, "M D"],
    sizes: Int[Array, "G"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "M E"]:
    """Runs `function(rows, dot)`, where `dot(rows, kernels)` multiplies every row by the kernel of its group.

    Args:
      function: row by row beside its products, such as a feed-forward. A row of zeros must give finite values.
      rows: those of group 0 first, then those of group 1, and so on; what is left over belongs to none.
      sizes: rows of each group.
      implementation: forces one; chosen by platform when None.

    Returns:
      The results; zeros for rows without a group.
    """
    count, groups = rows.shape[0], sizes.shape[0]
    if (implementation or choose_implementation()) == "ragged":
        missing = -count % _TPU_ROWS if jax.default_backend() == "tpu" else 0
        rows = jnp.pad(rows, ((0, missing), (0, 0)))
        out = function(rows, lambda x, kernels: jax.lax.ragged_dot(x, kernels, sizes))
        return jnp.where((jnp.arange(count) < sizes.sum())[:, None], out[:count], 0)
    height = max(1, min(_ROWS, count // (2 * groups)))  # half a block is empty at the end of a group
    num_blocks = (count + groups * (height - 1)) // height  # enough however the rows are shared out
    blocks = -(-sizes // height)
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(count), side="right")
    group_of_block = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(num_blocks), side="right")
    shift = jnp.cumsum(blocks) * height - blocks * height - (jnp.cumsum(sizes) - sizes)
    nowhere = num_blocks * height
    place = jnp.where(group < groups, jnp.arange(count) + shift[jnp.minimum(group, groups - 1)], nowhere)
    laid = jnp.zeros((nowhere, rows.shape[1]), rows.dtype).at[place].set(rows, mode="drop")
    group_of_block = jnp.minimum(group_of_block, groups - 1)
    out = function(laid.reshape(num_blocks, height, -1), lambda x, kernels: _dot_of_blocks(x, kernels, group_of_block))
    return out.reshape(nowhere, -1).at[place].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _dot_of_blocks(
    blocks: Float[Array, "N R D"], kernels: Float[Array, "G D E"], group: Int[Array, "N"]
) -> Float[Array, "N R E"]:
    def body(_: None, inputs: Any) -> tuple[None, jax.Array]:
        block, index = inputs
        return None, jnp.dot(block, kernels[index])

    return jax.lax.scan(body, None, (blocks, group))[1]


def _forward(blocks: jax.Array, kernels: jax.Array, group: jax.Array) -> tuple[jax.Array, Any]:
    return _dot_of_blocks(blocks, kernels, group), (blocks, kernels, group)


def _backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """Written out, so that each block adds to the gradient of its own kernel alone."""
    blocks, kernels, group = saved

    def body(total: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        block, index, gradient = inputs
        return total.at[index].add(jnp.dot(block.T, gradient)), jnp.dot(gradient, kernels[index].T)

    of_kernels, of_blocks = jax.lax.scan(body, jnp.zeros_like(kernels), (blocks, group, gradient))
    return of_blocks, of_kernels, None


_dot_of_blocks.defvjp(_forward, _backward)

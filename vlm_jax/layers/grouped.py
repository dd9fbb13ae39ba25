"""Products of rows with the kernel of their own group, such as tokens with the kernel of their expert.

| platform | implementation |
|---|---|
| TPU | `ragged`: `jax.lax.ragged_dot`, compiled to one fusion that skips the tiles without rows of a group; the \
gradient of the kernels, for which there is none, by blocks of rows |
| CPU, GPU | `blocks`: a loop over the blocks that hold rows of a group, with that group's kernel |

On the CPU, and on the GPU by default, XLA computes a ragged product as that of every row with every kernel, with a
mask; its flag xla_gpu_experimental_use_ragged_dot_fusion calls cuDNN instead. The loop has been timed on the CPU only.
On every platform, XLA reports the FLOPs of the masked product for a ragged product.

Source: the fusion as libtpu compiles it for TPU v5e with JAX 0.10; openxla/xla pull request 40189 for the GPU.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.layers.attention import is_written_out
from vlm_jax.layers.platform import platform
from vlm_jax.types import Tree

Implementation = Literal["ragged", "blocks"]
Dot = Callable[[jax.Array, jax.Array], jax.Array]  # (rows, kernels of all groups)

_ROWS = 64  # rows of a block at most: enough for a matrix product to run at full speed
_BLOCK = 512  # rows of a product in the gradient of kernels
_TPU_ROWS = 8  # XLA uses its grouped kernel for a multiple of so many rows, else every kernel for every row


def choose_implementation() -> Implementation:
    """The implementation for the mesh's platform; `ragged` where products are to be counted."""
    return "ragged" if platform() == "tpu" or is_written_out() else "blocks"


def by_group(
    function: Callable[[jax.Array, Dot], jax.Array],
    rows: Float[Array, "M D"],
    sizes: Int[Array, "G"],
    *,
    expected: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "M E"]:
    """Runs `function(rows, dot)`, where `dot(rows, kernels)` multiplies every row by the kernel of its group.

    Args:
      function: row-wise apart from its products, such as a feed-forward. A row of zeros must give finite values.
      rows: the rows of group 0 first, then those of group 1, and so on; remaining rows have no group.
      sizes: rows of each group.
      expected: number of rows that are likely to have a group, which sets the block size; all when None.
      implementation: forces one; chosen by platform when None.

    Returns:
      The results; zeros for rows without a group.
    """
    count, groups = rows.shape[0], sizes.shape[0]
    if (implementation or choose_implementation()) == "ragged":
        missing = -count % _TPU_ROWS if platform() == "tpu" else 0
        rows = jnp.pad(rows, ((0, missing), (0, 0)))
        product = jax.lax.ragged_dot if is_written_out() else _ragged_dot
        out = function(rows, lambda x, kernels: product(x, kernels, sizes))
        return jnp.where((jnp.arange(count) < sizes.sum())[:, None], out[:count], 0)
    likely = count if expected is None else expected
    height = max(1, min(_ROWS, likely // (2 * groups)))  # half a block is empty at the end of a group
    num_blocks = (count + groups * (height - 1)) // height  # enough for any distribution of the rows
    blocks = -(-sizes // height)
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(count), side="right")
    group_of_block = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(num_blocks), side="right")
    shift = jnp.cumsum(blocks) * height - blocks * height - (jnp.cumsum(sizes) - sizes)
    nowhere = num_blocks * height
    place = jnp.where(group < groups, jnp.arange(count) + shift[jnp.minimum(group, groups - 1)], nowhere)
    laid = jnp.zeros((nowhere, rows.shape[1]), rows.dtype).at[place].set(rows, mode="drop")
    group_of_block = jnp.minimum(group_of_block, groups - 1)

    def dot(x: jax.Array, kernels: jax.Array) -> jax.Array:
        return _dot_of_blocks(x, kernels, group_of_block, blocks.sum())

    out = function(laid.reshape(num_blocks, height, -1), dot)
    return out.reshape(nowhere, -1).at[place].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _ragged_dot(x: Float[Array, "M D"], kernels: Float[Array, "G D E"], sizes: Int[Array, "G"]) -> Float[Array, "M E"]:
    """`jax.lax.ragged_dot`, whose gradient of the kernels XLA computes as that of all rows for every kernel."""
    return jax.lax.ragged_dot(x, kernels, sizes)


def _ragged_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array], gradient: Float[Array, "M E"]
) -> tuple[jax.Array, jax.Array, None]:
    """Row blocks and groups that overlap are at most M / `_BLOCK` + G pairs, each a product of the block's own rows."""
    x, kernels, sizes = saved
    of_rows = jax.lax.ragged_dot(gradient, kernels.swapaxes(1, 2), sizes)
    height = min(len(x), _BLOCK)
    x, gradient = (jnp.pad(rows, ((0, -len(x) % height), (0, 0))) for rows in (x, gradient))
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first = starts // height
    pairs = jnp.cumsum(jnp.where(sizes > 0, (ends - 1) // height - first + 1, 0))
    pair = jnp.arange(len(x) // height + len(sizes))
    group = jnp.searchsorted(pairs, pair, side="right", method="compare_all")
    is_any = group < len(sizes)
    group = jnp.minimum(group, len(sizes) - 1)
    before = jnp.where(group > 0, pairs[group - 1], 0)
    block = jnp.minimum(first[group] + pair - before, len(x) // height - 1)
    low, high = (jnp.where(is_any, edge[group], 0) for edge in (starts, ends))

    begins = jnp.diff(group, prepend=-1) != 0

    def add(held: tuple[jax.Array, jax.Array], one: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, jax.Array], None]:
        of_kernels, total = held  # the sum of one group is float32, and rounded once
        group, begins, start, low, high = one
        row = start + jnp.arange(height)
        own = (row >= low) & (row < high)
        rows, back = (
            jnp.where(own[:, None], jax.lax.dynamic_slice_in_dim(whole, start, height), 0) for whole in (x, gradient)
        )
        product = jnp.dot(rows.T, back, preferred_element_type=jnp.float32)
        total = jnp.where(begins, 0, total) + product
        return (of_kernels.at[group].set(total.astype(kernels.dtype)), total), None

    zeros = jnp.zeros(kernels.shape, kernels.dtype), jnp.zeros(kernels.shape[1:], jnp.float32)
    of_kernels, total = (_varying_as(leaf, x, gradient, sizes) for leaf in zeros)
    (of_kernels, _), _ = jax.lax.scan(add, (of_kernels, total), (group, begins, block * height, low, high))
    return of_rows, of_kernels, None


_ragged_dot.defvjp(lambda x, kernels, sizes: (_ragged_dot(x, kernels, sizes), (x, kernels, sizes)), _ragged_backward)


@jax.custom_vjp
def _dot_of_blocks(
    blocks: Float[Array, "N R D"], kernels: Float[Array, "G D E"], group: Int[Array, "N"], filled: Int[Array, ""]
) -> Float[Array, "N R E"]:
    """Products of the first `filled` blocks with the kernels of their groups; zeros after them."""

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        return out.at[i].set(jnp.dot(blocks[i], kernels[group[i]]))

    out = jnp.zeros((*blocks.shape[:2], kernels.shape[-1]), blocks.dtype)
    return jax.lax.fori_loop(0, filled, body, _varying_as(out, blocks, kernels))


def _forward(blocks: jax.Array, kernels: jax.Array, group: jax.Array, filled: jax.Array) -> tuple[jax.Array, Tree]:
    return _dot_of_blocks(blocks, kernels, group, filled), (blocks, kernels, group, filled)


def _backward(saved: Tree, gradient: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    """Explicit: a loop of unknown length has no gradient, and each block adds only to its own kernel's gradient."""
    blocks, kernels, group, filled = saved

    def body(i: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        of_blocks, of_kernels = totals
        of_blocks = of_blocks.at[i].set(jnp.dot(gradient[i], kernels[group[i]].T))
        return of_blocks, of_kernels.at[group[i]].add(jnp.dot(blocks[i].T, gradient[i]))

    start = tuple(_varying_as(jnp.zeros_like(leaf), blocks, kernels, gradient) for leaf in (blocks, kernels))
    return *jax.lax.fori_loop(0, filled, body, start), None, None


def _varying_as(x: jax.Array, *others: jax.Array) -> jax.Array:
    """`x` marked as varying over the mesh axes over which any of `others` varies, inside `shard_map`."""
    axes = set().union(*(jax.typeof(other).mat.varying for other in others)) - jax.typeof(x).mat.varying
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


_dot_of_blocks.defvjp(_forward, _backward)

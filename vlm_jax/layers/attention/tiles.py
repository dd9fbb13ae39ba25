"""How sequences and heads are cut for a TPU's registers, whose rows have 128 lanes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES = 128
_BLOCK = 512  # positions at most; a block of logits in float32 is then 1 MiB


class Blocks(NamedTuple):
    """A sequence in blocks of one size, a multiple of the lanes.

    Attributes:
      size: positions of a block.
      count: number of blocks.
    """

    size: int
    count: int

    @property
    def padded(self) -> int:
        """Positions of all blocks."""
        return self.size * self.count


def blocks_of(length: int) -> Blocks:
    """The fewest blocks that hold a sequence, as small as its length allows."""
    count = -(-length // _BLOCK)
    return Blocks(-(-length // (count * LANES)) * LANES, count)


def padded(x: jax.Array, length: int, *, axis: int, value: int = 0) -> jax.Array:
    """`x` with `value` at its end along an axis, up to `length`."""
    if x.shape[axis] == length:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def widened(x: jax.Array) -> jax.Array:
    """Heads with zeros at their end, so that their width is a multiple of the lanes."""
    return padded(x, -(-x.shape[-1] // LANES) * LANES, axis=x.ndim - 1)

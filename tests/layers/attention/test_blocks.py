"""Attention inside blocks, which every device folds by itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.layers.attention import Context, attention


@pytest.mark.parametrize("implementation", [None, "splash"])
def test_blocks_equal_segments_of_their_own(kernels, implementation):
    """The mesh divides the sequence between blocks, which hold several windows and padding."""
    compare, drawn = kernels
    windows = np.tile([1, 1, 2, 2, 2, 0, 3, 3], (2, 8))
    own = np.where(windows, windows + 10 * (np.arange(64) // 8), 0)
    blocks, segments = (jnp.asarray(x) for x in (windows, own))
    context = Context("full", blocks, blocks, block=8)
    arrays, mesh = drawn(2, 64, 64, 4, 2, 8), {"fsdp": 2, "context": 4}
    compare(implementation, context, arrays, mesh, expected=Context("full", segments, segments))


def test_a_block_divides_the_sequence():
    x = jnp.zeros((1, 10, 1, 8))
    with pytest.raises(ValueError, match=r"attention in blocks of 4: expected .* a multiple of the block"):
        attention(x, x, x, Context("full", block=4))


def test_blocks_take_no_bias():
    x = jnp.zeros((1, 8, 1, 8))
    with pytest.raises(ValueError, match="attention in blocks of 4 takes no cache and no bias"):
        attention(x, x, x, Context("full", block=4, key_bias=jnp.zeros((1, 8))))

"""JAX's kernel for TPU, run by Pallas's interpreter, on one device and over a mesh."""

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.layers.attention import Context

SEGMENTS = np.repeat([[1, 2, 2, 0], [1, 1, 1, 1], [3, 3, 1, 1], [1, 2, 0, 0]], 35, axis=1)


@pytest.mark.parametrize(
    ("kind", "segmented", "mesh", "heads", "softcap"),
    [("full", False, {}, (2, 1), None), ("causal", True, {"data": 2, "fsdp": 2, "tensor": 2}, (4, 2), 1.5)],
)
def test_equals_the_written_out_softmax(kernels, kind, segmented, mesh, heads, softcap):
    """140 positions, which are padded to 256, and heads of 72."""
    compare, drawn = kernels
    segments = jnp.asarray(SEGMENTS) if segmented else None
    compare("splash", Context(kind, segments, segments, softcap=softcap), drawn(4, 140, 140, *heads, 72, 16), mesh)

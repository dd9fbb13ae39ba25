"""Our kernel for TPU, run by Pallas's interpreter over a mesh that does not divide the one head of keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.layers.attention import Context, tiles
from vlm_jax.layers.attention.flash import flash
from vlm_jax.layers.attention.marks import marks_of

SEGMENTS = np.repeat([[1, 2, 2, 0], [1, 1, 1, 1], [3, 3, 1, 1], [1, 2, 0, 0]], 75, axis=1)
BRANCHES = np.tile(np.repeat([0, 1, 2, 0], 25), (4, 3))


@pytest.mark.parametrize(
    ("kind", "window", "ids", "others"),
    [
        ("causal", 30, {"groups": BRANCHES}, {}),
        ("causal", 10, {"groups": BRANCHES}, {"groups_exceed_window": True, "softcap": 1.5}),
        ("causal", None, {"branches": BRANCHES}, {}),
        ("full", None, {}, {}),
    ],
)
def test_equals_the_written_out_softmax(kernels, monkeypatch, kind, window, ids, others):
    """300 positions in three blocks of 128, of which windows and segments leave some out, and heads of 24.

    Groups of 25 positions are longer than a window of 10.
    """
    monkeypatch.setattr(tiles, "_BLOCK", 128)
    compare, drawn = kernels
    segments, ids = jnp.asarray(SEGMENTS), {name: jnp.asarray(array) for name, array in ids.items()}
    window = None if window is None else jnp.asarray(window)
    context = Context(kind, segments, segments, window=window, **ids, **others)
    compare("flash", context, drawn(4, 300, 300, 4, 1, 24, 16), {"data": 2, "fsdp": 2, "tensor": 2})


def test_kernels_lower_for_a_tpu():
    """The forward pass and the two backward passes are Mosaic programs; only the TPU's own compiler is left out."""
    context = Context("causal", jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS), window=jnp.asarray(30))
    marks = marks_of(context, 4, 300, 300)
    query, key = (jnp.zeros((4, heads, 300, 80), jnp.bfloat16) for heads in (2, 1))
    loss = jax.grad(lambda arrays: flash(*arrays, marks, softcap=50.0).astype(jnp.float32).sum())
    text = jax.jit(loss).trace([query, key, key]).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 3

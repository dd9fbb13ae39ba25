"""Attention around a ring of devices."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.layers.attention import Context, entry, ring

SEGMENTS = np.array([[1] * 7 + [2] * 15 + [0] * 3, [1] * 25])
BRANCHES = np.array([[0] * 4 + [1] * 2 + [2] + [0] * 18, [0] * 9 + [1] * 8 + [2] * 8])


@pytest.mark.parametrize(
    ("kind", "window", "ids", "others"),
    [
        ("causal", 6, {"groups": BRANCHES}, {"groups_exceed_window": True, "softcap": 1.5}),
        ("causal", None, {"branches": BRANCHES}, {}),
        ("full", None, {}, {}),
    ],
)
def test_equals_the_written_out_softmax(kernels, kind, window, ids, others):
    """25 positions over 4 devices, so that a segment is on several and a device has several, and padding."""
    compare, drawn = kernels
    segments, ids = jnp.asarray(SEGMENTS), {name: jnp.asarray(array) for name, array in ids.items()}
    window = None if window is None else jnp.asarray(window)
    context = Context(kind, segments, segments, window=window, **ids, **others)
    compare("ring", context, drawn(2, 25, 25, 4, 2, 8, 6), {"tensor": 2, "context": 4})


def test_kernels_of_a_tpu_compute_the_steps(kernels, monkeypatch):
    compare, drawn = kernels
    monkeypatch.setattr(entry, "Products", functools.partial(ring.Kernels, interpret=True))
    segments = jnp.asarray(SEGMENTS[:, :20])
    compare(
        "ring", Context("causal", segments, segments, softcap=1.5), drawn(2, 20, 20, 2, 1, 8), {"data": 2, "context": 2}
    )


def test_a_ring_has_devices_and_a_sequence(kernels):
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ValueError, match=r"expected a mesh whose axis context is more than 1, .* got 1 shards"):
        entry.attention(x, x, x, Context("full"), implementation="ring")

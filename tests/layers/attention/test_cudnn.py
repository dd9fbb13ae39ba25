"""What cuDNN's kernel, which needs a GPU, is given: JAX's own attention understands the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.layers.attention import Context, attention

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("length", "segmented", "window", "biased", "causal"),
    [
        (7, False, None, False, True),
        (6, True, None, True, True),
        (7, True, 2, False, False),
        (7, False, 2, True, False),
    ],
)
def test_masks_are_causal_or_arrays_of_even_lengths(monkeypatch, reference, length, segmented, window, biased, causal):
    real, asked = jax.nn.dot_product_attention, []

    def stand_in(query, key, value, bias, mask, *, implementation, is_causal, scale):
        asked.append((implementation, is_causal, query.shape[1] % 2 if mask is not None else 0))
        return real(query, key, value, bias, mask, implementation="xla", is_causal=is_causal, scale=scale)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    bias = rng.normal(size=(2, 4, length, length)).astype(np.float32) if biased else None
    segments = jnp.asarray(SEGMENTS[:, :length]) if segmented else None
    context = Context("causal", segments, segments, window=None if window is None else jnp.asarray(window))
    given = None if bias is None else jnp.asarray(bias)
    out = attention(q, k, v, context, bias=given, scale=0.3, implementation="cudnn")
    index = np.arange(length)
    mask = np.tile(index[:, None] >= index[None], (2, 1, 1))
    if window is not None:
        mask &= index[:, None] - index[None] < window
    if segmented:
        mask &= SEGMENTS[:, :length, None] == SEGMENTS[:, None, :length]
    extra = {} if bias is None else {"bias": bias}
    np.testing.assert_allclose(out, reference.attention(q, k, v, mask, scale=0.3, **extra), atol=1e-5)
    assert asked == [("cudnn", causal, 0)]

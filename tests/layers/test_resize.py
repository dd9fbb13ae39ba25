"""Resizing by weights; these in tests/test_interpolation.py, and torch itself in tests/parity."""

import jax.numpy as jnp
import numpy as np

from vlm_jax.interpolation import interpolation_weights
from vlm_jax.layers.resize import resize, resize_axis


def test_rows_and_columns_are_resized_apart_and_the_dtype_stays():
    x = jnp.arange(2 * 3 * 4 * 5, dtype=jnp.float32).reshape(2, 3, 4, 5)
    out = resize(x, (2, 6), "bilinear")
    rows, cols = interpolation_weights(3, 2, "bilinear"), interpolation_weights(4, 6, "bilinear")
    np.testing.assert_allclose(out, np.einsum("bijc,oi,pj->bopc", x, rows, cols), atol=1e-5)
    assert resize(x.astype(jnp.bfloat16), (2, 6), "area").dtype == jnp.bfloat16
    assert resize(np.asarray(x), (3, 4), "bicubic").shape == x.shape
    np.testing.assert_allclose(resize_axis(x[0, 0], 0, 8, "area"), np.repeat(x[0, 0], 2, axis=0))

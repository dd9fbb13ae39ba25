"""Rotary positions against multiplication of complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.layers.rope import rope_angles, rotate


@pytest.mark.parametrize(("head_dim", "theta"), [(8, 10_000.0), (6, 100.0), (2, 10.0)])
def test_rotation_is_multiplication_of_complex_numbers(reference, head_dim, theta):
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 5, 3, head_dim)).astype(np.float32), rng.integers(0, 50, size=(2, 5))
    got = rotate(jnp.asarray(x), rope_angles(jnp.asarray(positions), head_dim, theta))
    np.testing.assert_allclose(got, reference.rotate(x, positions, theta), atol=1e-5)


def test_products_depend_on_distances_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def turned(x, position):
        return np.asarray(rotate(x, rope_angles(jnp.array([[position]]), 16, 1e4)))

    products = [(turned(q, i) * turned(k, j)).sum() for i, j in ((3, 1), (10, 8), (102, 100), (1, 3))]
    np.testing.assert_allclose(products[:3], products[0], atol=1e-5)
    assert abs(products[3] - products[0]) > 1e-2


def test_angles_are_float32_and_the_dtype_of_the_input_stays():
    angles = rope_angles(jnp.array([[40_001]]), 4, 100.0)
    np.testing.assert_array_equal(angles, np.float32([[[40_001, 4_000.1]]]))
    assert rotate(jnp.ones((1, 1, 2, 4), jnp.bfloat16), angles).dtype == jnp.bfloat16

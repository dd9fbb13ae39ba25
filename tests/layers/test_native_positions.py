"""Positions of patches at native resolution: 2D rotary angles and the resampled table."""

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.interpolation import interpolation_weights
from vlm_jax.layers.resampled_positions import ResampledPositions, cubic_weights
from vlm_jax.layers.resize import resize
from vlm_jax.layers.rope import rotate
from vlm_jax.layers.rope_2d import rope_2d_angles


def test_angles_are_of_the_row_then_of_the_column():
    angles = rope_2d_angles(jnp.array([[[3, 5], [0, 2]]]), 8, 100.0)
    np.testing.assert_allclose(angles, [[[3, 0.3, 5, 0.5], [0, 0, 2, 0.2]]], rtol=1e-6)


def test_products_depend_on_the_difference_of_places_alone():
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def product(query_place, key_place):
        places = (jnp.array([[place]]) for place in (query_place, key_place))
        turned = [rotate(x, rope_2d_angles(place, 16, 10_000.0)) for x, place in zip((query, key), places, strict=True)]
        return float(jnp.sum(turned[0] * turned[1]))

    query, key = jnp.asarray(query), jnp.asarray(key)
    np.testing.assert_allclose(product((4, 9), (1, 3)), product((13, 26), (10, 20)), rtol=1e-4)
    assert abs(product((4, 9), (1, 3)) - product((9, 4), (3, 1))) > 1e-2


def test_a_head_that_two_axes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        rope_2d_angles(jnp.zeros((1, 1, 2), int), 6, 10_000.0)


@pytest.mark.parametrize(("side", "size"), [(6, 6), (6, 4), (6, 15), (3, 1), (1, 5)])
def test_weights_are_those_of_the_static_resize(side, size):
    weights = cubic_weights(jnp.arange(size)[None], jnp.full((1, size), size), side)
    np.testing.assert_allclose(weights[0], interpolation_weights(side, size, "bicubic"), atol=1e-5)


def test_images_of_several_sizes_read_one_table():
    side, width, sizes = 5, 4, [(3, 8), (5, 5)]
    table = np.random.default_rng(0).normal(size=(side, side, width)).astype(np.float32)
    places = np.concatenate([np.stack(np.mgrid[:rows, :cols], -1).reshape(-1, 2) for rows, cols in sizes])
    of_image = np.concatenate([np.tile([size], (size[0] * size[1], 1)) for size in sizes])
    found = ResampledPositions(side, width).apply(
        {"params": {"table": table.reshape(-1, width)}},
        jnp.asarray(places)[None],
        jnp.asarray(of_image)[None],
    )
    expected = [resize(jnp.asarray(table), size, "bicubic").reshape(-1, width) for size in sizes]
    np.testing.assert_allclose(found[0], np.concatenate(expected), atol=1e-5)

"""Qwen-VL's own resampler: its stored positions; its numbers are tested by tests/golden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.connectors.resampler import Resampler
from vlm_jax.layers.position_embedding import sincos_2d
from vlm_jax.types import VisualFeatures

RESAMPLER = Resampler(features=8, num_queries=4, num_heads=2, released=True)


def features(width, grid=(3, 3)):
    tokens = np.random.default_rng(0).normal(size=(2, grid[0] * grid[1], width)).astype(np.float32)
    return VisualFeatures(jnp.asarray(tokens), jnp.ones(tokens.shape[:2], bool), grid)


@pytest.mark.parametrize("width", [6, 8])
def test_features_of_the_decoders_width_are_not_projected(width):
    init = jax.eval_shape(lambda x: RESAMPLER.init(jax.random.key(0), x, deterministic=True), features(width))
    assert ("kv_proj" in nn.meta.unbox(init)["params"]) == (width != 8)


def test_stored_positions_start_as_sin_cos_and_are_not_trained():
    inputs = features(6)
    params = nn.meta.unbox(RESAMPLER.init(jax.random.key(0), inputs, deterministic=True))
    np.testing.assert_array_equal(params["params"]["positions"], sincos_2d((2, 2), 8, last=False))

    def loss(params):
        return jnp.square(RESAMPLER.apply(params, inputs, deterministic=True).tokens).sum()

    gradients = jax.jit(jax.grad(loss))(params)["params"]
    assert not gradients["positions"].any() and gradients["queries"].any()


def test_stored_positions_want_a_square_of_queries():
    with pytest.raises(ValueError, match="square number of queries, got 6"):
        jax.eval_shape(
            lambda x: RESAMPLER.clone(num_queries=6).init(jax.random.key(0), x, deterministic=True),
            features(6),
        )

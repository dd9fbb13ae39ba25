"""Learned queries behind the features of an encoder: which of both attend to which, and which table an image takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.encoders.causal_queries import CausalQueries
from vlm_jax.encoders.vit import ViT
from vlm_jax.testing.kinds import small

QUERIES = 5  # for the 4 features of an image of 16 x 16 pixels


def made(*table_sizes):
    first = small(ViT, image_size=(16, 16))
    return CausalQueries(first, table_sizes, depth=2, num_heads=2, num_kv_heads=1, mlp_dim=24)


def images(*size):
    return jnp.asarray(np.random.default_rng(0).normal(size=(1, *size, 3)), jnp.float32)


@pytest.fixture(scope="module")
def drawn():
    """The parameters of an encoder, and a function of them and an image that gives its features."""
    encoder = made(QUERIES, 9)
    params = nn.meta.unbox(jax.jit(encoder.init)(jax.random.key(0), images(16, 16)))["params"]
    return params, jax.jit(lambda params, pixels: encoder.apply({"params": params}, pixels).tokens[0])


@pytest.mark.parametrize("changed", range(QUERIES))
def test_a_query_attends_to_those_before_it(drawn, changed):
    params, encode = drawn
    before = encode(params, images(16, 16))
    after = encode({**params, "queries_0": params["queries_0"].at[changed].add(1.0)}, images(16, 16))
    moved = np.abs(after - before).max(axis=1) > 1e-4
    np.testing.assert_array_equal(moved, np.arange(QUERIES) >= changed)


@pytest.mark.parametrize("corner", [(0, 0), (8, 8)])
def test_every_query_attends_to_every_feature(drawn, corner):
    params, encode = drawn
    row, col = corner
    before = encode(params, images(16, 16))
    after = encode(params, images(16, 16).at[:, row : row + 8, col : col + 8].add(1.0))
    assert (np.abs(after - before).max(axis=1) > 1e-4).all()


def test_an_image_takes_the_first_table_with_as_many_rows_as_features():
    encoder = made(4, 6, 9)
    counts = {(16, 16): (2, 2), (16, 8): (2, 2), (16, 24): (1, 6), (24, 24): (3, 3), (64, 64): (3, 3)}
    assert {size: encoder.grid(*size) for size in counts} == counts


@pytest.mark.parametrize("table_sizes", [(), (9, 4), (4, 4)])
def test_tables_are_in_ascending_order(table_sizes):
    with pytest.raises(ValueError, match="table_sizes: expected numbers in ascending order"):
        made(*table_sizes).grid(16, 16)

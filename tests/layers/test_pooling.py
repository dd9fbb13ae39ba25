import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.layers.pooling import MapHead, reduce_tokens

X = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
MASK = np.asarray([[True] * 3 + [False] * 2, [False] + [True] * 4])


@pytest.mark.parametrize(("kind", "reduce"), [("mean", np.mean), ("max", np.max)])
def test_what_is_masked_counts_for_nothing(kind, reduce):
    x = np.where(MASK[..., None], X, 100).astype(np.float32)
    expected = np.stack([reduce(row[mask], axis=0) for row, mask in zip(X, MASK, strict=True)])
    np.testing.assert_allclose(reduce_tokens(jnp.asarray(x), kind, jnp.asarray(MASK)), expected, atol=1e-6)
    np.testing.assert_allclose(reduce_tokens(jnp.asarray(X), kind), reduce(X, axis=1), atol=1e-6)


@pytest.mark.parametrize(("kind", "index"), [("first", 0), ("last", -1)])
def test_one_token_is_taken(kind, index):
    np.testing.assert_array_equal(reduce_tokens(jnp.asarray(X), kind), X[:, index])


def test_a_probe_reads_what_is_not_masked():
    head = MapHead(num_heads=2, mlp_dim=6, activation="gelu", norm_epsilon=1e-6)
    params = nn.meta.unbox(jax.jit(head.init)(jax.random.key(0), X))
    apply = jax.jit(head.apply)
    masked = apply(params, X, MASK)
    for row, mask, found in zip(X, MASK, masked, strict=True):
        np.testing.assert_allclose(found, apply(params, row[mask][None])[0], atol=1e-5)

"""Cross entropy against scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from vlm_jax.losses.cross_entropy import cross_entropy


def example(shape=(3, 4), vocab=7, scale=2.0, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(size=shape).astype(np.float32) * (rng.uniform(size=shape) < 0.7)
    logits = (scale * rng.normal(size=(*shape, vocab))).astype(np.float32)
    return logits, rng.integers(0, vocab, size=shape), weights


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 2, 2, 3)])
@pytest.mark.parametrize("scale", [2.0, 1e4])
def test_value_and_accuracy(shape, scale):
    logits, targets, weights = example(shape, scale=scale)
    value, accuracy = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    picked = np.take_along_axis(log_softmax(np.float64(logits), axis=-1), targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(value, -(picked * weights).sum() / weights.sum(), rtol=1e-5)
    right = logits.argmax(-1) == targets
    np.testing.assert_allclose(accuracy, (right * weights).sum() / weights.sum(), rtol=1e-5)


def test_gradient():
    logits, targets, weights = example()
    grad = jax.grad(lambda x: cross_entropy(x, jnp.asarray(targets), jnp.asarray(weights))[0])(jnp.asarray(logits))
    error = softmax(np.float64(logits), axis=-1) - np.eye(7)[targets]
    np.testing.assert_allclose(grad, error * weights[..., None] / weights.sum(), atol=1e-6)


def test_nothing_to_predict_is_zero_and_has_no_gradient():
    logits, targets, weights = example()

    def loss(x):
        return cross_entropy(x, jnp.asarray(targets), jnp.asarray(0 * weights))

    (value, accuracy), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logits))
    assert value == accuracy == 0.0
    assert not np.any(grad)


def test_what_has_no_weight_changes_nothing():
    logits, targets, weights = example()
    other = np.where(weights > 0, targets, (targets + 1) % 7)
    moved = np.where(weights[..., None] > 0, logits, -logits)
    first = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weights))
    np.testing.assert_allclose(cross_entropy(jnp.asarray(moved), jnp.asarray(other), jnp.asarray(weights)), first)


def test_bfloat16_logits_are_summed_in_float32():
    # 4096 equal logits: log(4096), which a bfloat16 sum would not reach.
    logits = jnp.zeros((2, 4096), jnp.bfloat16)
    value, _ = cross_entropy(logits, jnp.zeros(2, jnp.int32), jnp.ones(2))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, np.log(4096), rtol=1e-6)

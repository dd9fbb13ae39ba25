"""Cross entropy, whole and by blocks of the vocabulary, against NumPy and scipy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax

from vlm_jax.losses.cross_entropy import cross_entropy, head_cross_entropy
from vlm_jax.losses.vocabulary_blocks import Blocks


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


def plain(hidden, kernel, targets, weights, z_loss):
    """Loss, accuracy and z-loss, and gradients of hidden states and kernel [D, V], in float64."""
    hidden, kernel, weights = np.float64(hidden), np.float64(kernel), np.float64(weights)
    logits = hidden @ kernel
    normaliser = logsumexp(logits, axis=-1)
    picked = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    share = weights / max(weights.sum(), 1e-6)
    squared = z_loss * (normaliser**2 * share).sum()
    value = ((normaliser - picked) * share).sum() + squared
    error = softmax(logits, axis=-1) * (1 + 2 * z_loss * normaliser[..., None]) - np.eye(kernel.shape[1])[targets]
    error *= share[..., None]
    accuracy = ((logits.argmax(-1) == targets) * share).sum()
    return (value, accuracy, squared), (error @ kernel.T, np.einsum("btd,btv->dv", hidden, error))


def by_blocks(hidden, kernel, targets, weights, blocks, z_loss=0.0):
    """`head_cross_entropy`, and gradients of hidden states and kernel, both [D, V] whatever the layout."""

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(hidden, kernel):
        kernel = kernel.T if blocks.vocab_axis == 0 else kernel
        found = head_cross_entropy(
            hidden, kernel, jnp.asarray(targets), jnp.asarray(weights), blocks=blocks, z_loss=z_loss
        )
        return found.value, found

    (_, found), grads = jax.jit(loss)(jnp.asarray(hidden), jnp.asarray(kernel))
    return found, grads


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(
    "blocks", [Blocks(0, 5), Blocks(1, 5), Blocks(1, 4, shards=2), Blocks(0, 3, shards=3), Blocks(0, 1), Blocks(1, 12)]
)
def test_blocks_have_the_numbers_of_the_plain_formula(blocks, z_loss):
    rng = np.random.default_rng(1)
    _, targets, weights = example((2, 5), vocab=12)
    assert not np.all(weights)
    hidden, kernel = np.float32(rng.normal(size=(2, 5, 6))), np.float32(rng.normal(size=(6, 12)))
    targets[0] = (hidden[0] @ kernel).argmax(-1)
    found, grads = by_blocks(hidden, kernel, targets, weights, blocks, z_loss)
    values, expected = plain(hidden, kernel, targets, weights, z_loss)
    assert 0 < values[1] < 1
    np.testing.assert_allclose(found, values, rtol=1e-5)
    for grad, each in zip(grads, expected, strict=True):
        np.testing.assert_allclose(grad, each, atol=1e-5 * np.abs(each).max())


@pytest.mark.parametrize("blocks", [Blocks(0, 5), Blocks(1, 4, shards=2), Blocks(1, 12)])
def test_blocks_of_bounded_logits(blocks):
    """By the chain rule from the plain formula, whose hidden states are the bounded logits and whose kernel is 1."""
    rng = np.random.default_rng(1)
    _, targets, weights = example((2, 5), vocab=12)
    hidden, kernel = np.float32(rng.normal(size=(2, 5, 6))), np.float32(rng.normal(size=(6, 12)))
    found, grads = by_blocks(hidden, kernel, targets, weights, blocks._replace(softcap=1.5), z_loss=1e-2)
    logits = 1.5 * np.tanh(np.float64(hidden) @ np.float64(kernel) / 1.5)
    values, (error, _) = plain(logits, np.eye(12), targets, weights, 1e-2)
    np.testing.assert_allclose(found, values, rtol=1e-5)
    error = error * (1 - (logits / 1.5) ** 2)
    for grad, each in zip(grads, (error @ kernel.T, np.einsum("btd,btv->dv", hidden, error)), strict=True):
        np.testing.assert_allclose(grad, each, atol=1e-5 * np.abs(each).max())


def test_blocks_without_a_weight_are_zero_and_have_no_gradient():
    _, targets, weights = example((2, 5))
    found, grads = by_blocks(np.ones((2, 5, 3)), np.ones((3, 7)), targets, 0 * weights, Blocks(1, 2), z_loss=1.0)
    assert found == (0.0, 0.0, 0.0)
    assert not any(np.any(grad) for grad in grads)


def test_of_equal_logits_in_several_blocks_the_first_counts():
    targets = np.array([[0, 1, 5, 6]])
    found, _ = by_blocks(np.ones((1, 4, 3)), np.ones((3, 7)), targets, np.ones((1, 4)), Blocks(1, 2))
    np.testing.assert_allclose(found, (np.log(7), 1 / 4, 0), rtol=1e-6)


def test_large_logits_of_blocks_do_not_overflow():
    logits, targets, weights = example((2, 5), scale=1e4)
    found, _ = by_blocks(logits, np.eye(7, dtype=np.float32), targets, weights, Blocks(0, 2))
    values, _ = plain(logits, np.eye(7), targets, weights, 0.0)
    np.testing.assert_allclose(found, values, rtol=1e-5)


def test_gradients_of_bfloat16_blocks_are_summed_in_float32():
    """1024 blocks of equal logits: a bfloat16 sum of terms of one size stops growing at 256 of them."""
    blocks = Blocks(1, 1, dtype=jnp.bfloat16)
    kernel = jnp.ones((1, 1024), jnp.bfloat16)
    targets = jnp.full((1, 1), 1023)
    _, (of_hidden, of_kernel) = by_blocks(jnp.ones((1, 1, 1), jnp.bfloat16), kernel, targets, np.ones((1, 1)), blocks)
    assert of_hidden.dtype == of_kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(of_hidden), 0.0, atol=1e-2)  # 1024 / 1024 - 1
    np.testing.assert_allclose(np.float32(of_kernel[0, :-1]), 1 / 1024, rtol=1e-2)


@pytest.mark.parametrize("blocks", [Blocks(0, 0), Blocks(0, 2, shards=2)])
def test_blocks_that_cannot_be_are_an_error(blocks):
    with pytest.raises(ValueError, match="expected at least 1 id in a block and a vocabulary of equal shards"):
        by_blocks(np.ones((1, 2, 3)), np.ones((3, 7)), np.zeros((1, 2), np.int32), np.ones((1, 2)), blocks)


@pytest.mark.parametrize("size", [7, 3])
def test_capped_logits_in_blocks(size):
    """Value and gradients of -log softmax(c tanh(logits / c)), in one block and in several, in float64."""
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(2, 4, 5)), rng.normal(size=(7, 5))
    targets, cap = rng.integers(0, 7, size=(2, 4)), 1.5
    weights = np.ones((2, 4), np.float32)

    def loss(hidden, kernel):
        blocks = Blocks(0, size, softcap=cap)
        return head_cross_entropy(hidden, kernel, jnp.asarray(targets), jnp.asarray(weights), blocks=blocks).value

    given = jnp.asarray(hidden, jnp.float32), jnp.asarray(kernel, jnp.float32)
    value, found = jax.value_and_grad(loss, (0, 1))(*given)
    squashed = np.tanh(hidden @ kernel.T / cap)
    log_shares, ones = log_softmax(cap * squashed, axis=-1), np.eye(7)[targets]
    np.testing.assert_allclose(value, -(log_shares * ones).sum() / 8, rtol=1e-5)
    error = (np.exp(log_shares) - ones) * (1 - squashed**2) / 8
    np.testing.assert_allclose(found[0], error @ kernel, atol=1e-6)
    np.testing.assert_allclose(found[1], np.einsum("btv,btd->vd", error, hidden), atol=1e-6)

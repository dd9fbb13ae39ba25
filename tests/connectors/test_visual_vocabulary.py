"""Ovis's ways to choose visual words, in training and at inference; its numbers are tested by tests/golden."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.special import softmax

from vlm_jax.connectors.visual_vocabulary import VisualVocabulary
from vlm_jax.types import VisualFeatures

from ..parameters import drawn

WIDTH_IN, GRID = 6, (4, 5)
KINDS = ["softmax", "gumbel_argmax", "st_argmax", "hard_softmax"]
CONNECTOR = VisualVocabulary(features=8, vocab_size=12, factor=2, num_indicators=3)
RNGS = {"connect": jax.random.key(5)}
every_kind = pytest.mark.parametrize("tokenize", KINDS)


def example(masked=0.3):
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(3, 20, WIDTH_IN)).astype(np.float32)
    return VisualFeatures(jnp.asarray(tokens), jnp.asarray(rng.uniform(size=(3, 20)) >= masked), GRID)


@functools.cache
def params():
    init = functools.partial(CONNECTOR.init, deterministic=True)
    return nn.meta.unbox(drawn(jax.eval_shape(init, jax.random.key(0), example())))


def run(tokenize, features, *, deterministic):
    connector = CONNECTOR.clone(tokenize=tokenize, tau=0.5)
    apply = jax.jit(functools.partial(connector.apply, deterministic=deterministic))
    return apply(params(), features, rngs=RNGS)


def logits(features):
    """By hand: squares of 2 whose last column is completed with zeros, a linear layer and a LayerNorm."""
    p = jax.tree.map(np.float64, params()["params"])
    x = np.zeros((3, 4, 6, WIDTH_IN))
    x[:, :, :5] = np.where(features.mask[..., None], features.tokens, 0).reshape(3, *GRID, WIDTH_IN)
    x = x.reshape(3, 2, 2, 3, 2, WIDTH_IN).swapaxes(2, 3).reshape(3, 6, -1) @ p["head"]["kernel"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * p["head_norm"]["scale"] + p["head_norm"]["bias"]


@every_kind
def test_inference_averages_the_table_or_looks_a_row_up(tokenize):
    features, table = example(), np.float64(params()["params"]["table"]["embedding"])
    expected = logits(features)
    rows = softmax(expected, -1) @ table[:9] if tokenize == "softmax" else table[expected.argmax(-1)]
    out = run(tokenize, features, deterministic=True)
    np.testing.assert_allclose(out.tokens, rows, atol=1e-5)
    if tokenize != "softmax":
        np.testing.assert_array_equal(out.tokens, table[expected.argmax(-1)].astype(np.float32))


@pytest.mark.parametrize("tokenize", KINDS[1:])
def test_training_takes_one_row_as_well(tokenize):
    """The row of the largest logit; with Gumbel noise rows as frequent as the softmax says."""
    features, table = example(0.0), np.asarray(params()["params"]["table"]["embedding"])[:9]
    out = np.asarray(run(tokenize, features, deterministic=False).tokens)
    chosen = np.abs(out[:, :, None] - table).max(-1)
    assert (chosen.min(-1) <= 1e-5).all()
    if tokenize != "gumbel_argmax":
        np.testing.assert_array_equal(chosen.argmin(-1), logits(features).argmax(-1))
        return
    connector = CONNECTOR.clone(tokenize=tokenize, tau=0.5)
    x = jnp.asarray(logits(features)[:1, :1], jnp.float32)
    many = jnp.broadcast_to(x, (1, 20_000, 9))
    words = connector.apply({}, many, deterministic=False, method="words", rngs=RNGS)
    share = softmax(np.asarray(x[0, 0], np.float64))
    deviation = np.sqrt(share * (1 - share) / 20_000)
    assert (np.abs(words[0].mean(0) - share) <= 4 * deviation).all()


@every_kind
def test_gradients_in_training(tokenize):
    """Of sum(words * weights), for the softmax after each kind in closed form."""
    x = jnp.asarray(logits(example())[:1], jnp.float32)
    weights = np.random.default_rng(1).normal(size=x.shape)
    connector = CONNECTOR.clone(tokenize=tokenize, tau=0.5)

    def words(x):
        return connector.apply({}, x, deterministic=False, method="words", rngs=RNGS)

    gradient = jax.grad(lambda x: jnp.sum(words(x) * weights))(x)
    if tokenize == "st_argmax":
        np.testing.assert_allclose(gradient, weights, rtol=1e-6)
        return
    tau, noise = 1.0, 0.0
    if tokenize == "gumbel_argmax":
        tau = 0.5
        drawn_noise = nn.apply(lambda module: jax.random.gumbel(module.make_rng("connect"), x.shape), connector)
        noise = np.asarray(drawn_noise({}, rngs=RNGS))
    soft = softmax((np.float64(x) + noise) / tau, -1)
    expected = soft * (weights - (soft * weights).sum(-1, keepdims=True)) / tau
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@every_kind
def test_every_parameter_learns_and_masked_features_change_nothing(tokenize):
    connector, clean = CONNECTOR.clone(tokenize=tokenize), example(0.5)
    dirty = VisualFeatures(jnp.where(clean.mask[..., None], clean.tokens, jnp.nan), clean.mask, GRID)

    def loss(params, features):
        out = connector.apply(params, features, deterministic=False, rngs=RNGS)
        return jnp.sum(jnp.sin(out.tokens + jnp.arange(8)[None, None]))

    gradient = jax.jit(jax.grad(loss))
    expected = gradient(params(), clean)["params"]
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(expected))
    assert not expected["table"]["embedding"][9:].any()  # no feature reaches an indicator
    jax.tree.map(np.testing.assert_array_equal, gradient(params(), dirty)["params"], expected)


def test_indicators_are_the_last_rows_and_learn():
    def total(params):
        return CONNECTOR.apply(params, method="indicators").sum()

    table = params()["params"]["table"]["embedding"]
    np.testing.assert_array_equal(CONNECTOR.apply(params(), method="indicators"), table[9:])
    gradient = jax.grad(total)(params())["params"]["table"]["embedding"]
    np.testing.assert_array_equal(gradient, np.arange(12)[:, None] >= np.full((1, 8), 9))


@pytest.mark.parametrize(("rows", "indicators"), [(3, 3), (3, -1)])
def test_a_vocabulary_without_words_is_refused(rows, indicators):
    connector = CONNECTOR.clone(vocab_size=rows, num_indicators=indicators)
    with pytest.raises(ValueError, match=f"num_indicators: expected 0 to {rows - 1}, got {indicators}"):
        connector.init(jax.random.key(0), example(), deterministic=True)

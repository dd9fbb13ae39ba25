"""The block against NumPy, and the scanned stack against a loop over its slices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.special import expit

from vlm_jax.layers.attention import Context
from vlm_jax.layers.block import REMAT_POLICIES, TransformerBlock, TransformerStack

from ..parameters import drawn

DEPTH, WIDTH = 3, 8
BLOCK = {
    "num_heads": 2,
    "num_kv_heads": 1,
    "mlp_dim": 12,
    "activation": "silu",
    "gated": True,
    "norm": "rms",
    "norm_epsilon": 1e-5,
}
SEGMENTS = jnp.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]])
CONTEXT = Context("causal", SEGMENTS, SEGMENTS)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, WIDTH)), jnp.float32)


@pytest.fixture(scope="module")
def params(x):
    return nn.meta.unbox(drawn(jax.eval_shape(TransformerStack(DEPTH, BLOCK).init, jax.random.key(0), x, CONTEXT)))


def layer_params(params, i):
    return jax.tree.map(lambda p: p[i], params["params"]["layers"])


def test_a_block_is_two_residual_steps(reference, x, params):
    p = jax.tree.map(np.float64, layer_params(params, 0))
    out, cache = jax.jit(TransformerBlock(**BLOCK).apply)({"params": layer_params(params, 0)}, x, None, CONTEXT)
    assert cache is None
    y = np.float64(x)
    normed = reference.rms_norm(y, p["attention_norm"]["scale"], 1e-5)
    heads = {
        name: reference.dense(normed, p["attention"][name]).reshape(2, 5, count, -1)
        for name, count in (("query", 2), ("key", 1), ("value", 1))
    }
    mask = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & np.tril(np.ones((1, 5, 5), bool))
    attended = reference.attention(heads["query"], heads["key"], heads["value"], np.asarray(mask))
    y = y + reference.dense(attended.reshape(2, 5, -1), p["attention"]["out"])
    normed = reference.rms_norm(y, p["mlp_norm"]["scale"], 1e-5)
    gate = reference.dense(normed, p["mlp"]["gate"])
    y = y + reference.dense(gate * expit(gate) * reference.dense(normed, p["mlp"]["up"]), p["mlp"]["down"])
    np.testing.assert_allclose(out, y, atol=2e-5)


def test_layer_scale_multiplies_what_is_added(x, params):
    scaled = TransformerBlock(**BLOCK, layer_scale=0.1)
    fresh = nn.meta.unbox(jax.jit(scaled.init)(jax.random.key(0), x, None, CONTEXT))["params"]
    np.testing.assert_allclose([fresh["attention_scale"], fresh["mlp_scale"]], np.full((2, WIDTH), 0.1))
    plain = layer_params(params, 0)
    factors = np.random.default_rng(1).normal(size=(2, WIDTH)).astype(np.float32)
    given = {**plain, "attention_scale": jnp.asarray(factors[0]), "mlp_scale": jnp.asarray(factors[1])}
    out, _ = jax.jit(scaled.apply)({"params": given}, x, None, CONTEXT)
    # A product's factors may as well be in the weights of the last linear layers.
    folded = jax.tree.map(np.asarray, plain)
    for part, layer, factor in (("attention", "out", factors[0]), ("mlp", "down", factors[1])):
        folded[part][layer] = jax.tree.map(lambda leaf, by=factor: leaf * by, folded[part][layer])
    expected, _ = jax.jit(TransformerBlock(**BLOCK).apply)({"params": folded}, x, None, CONTEXT)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("unroll", [1, DEPTH])
def test_a_stack_is_a_loop_over_slices_of_its_parameters(x, params, unroll):
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params)} == {DEPTH}
    block = jax.jit(TransformerBlock(**BLOCK).apply)
    states = [x]
    for i in range(DEPTH):
        states.append(block({"params": layer_params(params, i)}, states[-1], None, CONTEXT)[0])
    stack = TransformerStack(DEPTH, BLOCK, unroll=unroll)
    out, cache, hidden = jax.jit(functools.partial(stack.apply, collect=True))(params, x, CONTEXT)
    np.testing.assert_allclose(out, states[-1], atol=1e-5)
    assert cache is None and hidden.shape == (DEPTH + 1, 2, 5, WIDTH)
    np.testing.assert_allclose(hidden, np.stack(states), atol=1e-5)  # every input, and the last output
    plain, _, nothing = jax.jit(stack.apply)(params, x, CONTEXT)
    np.testing.assert_array_equal(plain, out)
    assert nothing is None


def test_layers_are_drawn_apart(x):
    boxed = jax.jit(TransformerStack(DEPTH, BLOCK).init)(jax.random.key(0), x, CONTEXT)
    kernel = np.asarray(nn.meta.unbox(boxed)["params"]["layers"]["mlp"]["up"]["kernel"])
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1
    assert 0.8 < kernel.std() * np.sqrt(WIDTH) < 1.2  # a layer axis is not a fan-in


def value_and_grads(stack, params, x):
    def loss(params, x):
        return jnp.sum(jnp.sin(stack.apply(params, x, CONTEXT)[0]))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


@pytest.fixture(scope="module")
def kept(x, params):
    """Value and gradients without rematerialisation."""
    return value_and_grads(TransformerStack(DEPTH, BLOCK), params, x)(params, x)


def saved_bytes(stack, params, x):
    """Bytes that the forward pass of the scan hands to the backward pass, of rows whose attention is most of them."""
    segments = jnp.tile(SEGMENTS, (1, 8))
    context, x = Context("causal", segments, segments), jnp.tile(x, (1, 8, 1))
    _, pullback = jax.eval_shape(lambda p: jax.vjp(lambda x: stack.apply(p, x, context)[0], x), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_every_remat_policy_gives_the_same_and_saves_memory(x, params, kept, policy):
    stack = TransformerStack(DEPTH, BLOCK, remat=policy)
    value, grads = value_and_grads(stack, params, x)(params, x)
    np.testing.assert_allclose(value, kept[0], rtol=1e-6)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5), grads, kept[1])
    assert saved_bytes(stack, params, x) < saved_bytes(TransformerStack(DEPTH, BLOCK), params, x)

"""Feed-forward blocks against NumPy; activations against scipy's normal distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.special import expit
from scipy.stats import norm

from vlm_jax.layers.mlp import ACTIVATIONS, Mlp

from ..parameters import drawn

REFERENCES = {
    "gelu": lambda x: x * norm.cdf(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "quick_gelu": lambda x: x * expit(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * expit(x),
}


def test_every_activation_has_a_reference():
    assert set(ACTIVATIONS) == set(REFERENCES)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), REFERENCES[name](x), atol=1e-5)


@pytest.mark.parametrize(("gated", "use_bias", "out_dim"), [(False, True, None), (True, False, 5), (True, True, None)])
def test_mlp(reference, gated, use_bias, out_dim):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 6)), jnp.float32)
    layer = Mlp(8, "silu", gated=gated, out_dim=out_dim, use_bias=use_bias)
    params = nn.meta.unbox(drawn(jax.eval_shape(layer.init, jax.random.key(0), x)))["params"]
    assert set(params) == {"up", "down", *(["gate"] if gated else [])}
    assert all(set(tree) == {"kernel", *(["bias"] if use_bias else [])} for tree in params.values())
    hidden = reference.dense(np.float64(x), params["up"])
    act = REFERENCES["silu"]
    hidden = act(reference.dense(np.float64(x), params["gate"])) * hidden if gated else act(hidden)
    out = jax.jit(layer.apply)({"params": params}, x)
    assert out.shape == (2, 3, out_dim or 6)
    np.testing.assert_allclose(out, reference.dense(hidden, params["down"]), atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_depth_counts_linear_layers(reference, depth):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6)), jnp.float32)
    layer = Mlp(8, "relu", out_dim=5, depth=depth)
    params = nn.meta.unbox(drawn(jax.eval_shape(layer.init, jax.random.key(0), x)))["params"]
    expected = np.float64(x)
    for name in ["up", "middle_0", "middle_1"][: depth - 1]:
        expected = REFERENCES["relu"](reference.dense(expected, params[name]))
    out = jax.jit(layer.apply)({"params": params}, x)
    np.testing.assert_allclose(out, reference.dense(expected, params["down"]), atol=1e-5)
    assert len(params) == depth


@pytest.mark.parametrize(("depth", "gated", "least"), [(0, False, 1), (1, True, 2)])
def test_too_few_layers_are_refused(depth, gated, least):
    with pytest.raises(ValueError, match=f"expected at least {least} linear layers, got {depth}"):
        Mlp(8, "relu", gated=gated, depth=depth).init(jax.random.key(0), jnp.zeros((1, 2)))


@pytest.mark.parametrize(("gated", "depth", "stored"), [(True, 2, 2), (False, 2, 1), (False, 4, 3)])
def test_the_backward_pass_stores_only_outputs_of_products(gated, depth, stored):
    x = jnp.ones((2, 3, 6))
    layer = Mlp(8, "silu", gated=gated, depth=depth)
    params = nn.meta.unbox(drawn(jax.eval_shape(layer.init, jax.random.key(0), x)))
    _, vjp = jax.vjp(layer.apply, params, x)
    assert sum(leaf.shape[:-1] == x.shape[:-1] and leaf.shape[-1] == 8 for leaf in jax.tree.leaves(vjp)) == stored

"""Layers as separate arrays: the values of the stack, and none of its copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.layers.attention import Context
from vlm_jax.layers.block import TransformerStack
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.per_layer import (
    LayerChoice,
    PerLayer,
    linear,
    of_layer,
    per_layer_kernels,
    picked,
    product,
    written,
)

from ..parameters import drawn

DEPTH = 3


@pytest.fixture(scope="module")
def stack():
    return jnp.asarray(np.random.default_rng(0).normal(size=(DEPTH, 2, 4, 5)), jnp.float32)


def test_indexing_gives_what_the_stack_gives(stack):
    per_layer = PerLayer.of(stack)
    assert (per_layer.shape, per_layer.dtype) == (stack.shape, stack.dtype)
    np.testing.assert_array_equal(per_layer[1], stack[1])
    np.testing.assert_array_equal(per_layer[1:][0], stack[1])
    chosen = per_layer[jnp.asarray(2)]
    assert isinstance(chosen, LayerChoice) and chosen.shape == stack.shape[1:]
    np.testing.assert_array_equal(picked(lambda layer, x: layer * x, chosen, 2), 2 * stack[2])
    of = of_layer({"a": per_layer, "b": jnp.arange(DEPTH)}, jnp.asarray(1))
    np.testing.assert_array_equal(picked(jnp.copy, of["a"]), stack[1])
    assert of["b"] == 1


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", [1, 2])
def test_products_are_those_of_the_layer(stack, rows, heads):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(heads, rows, 4)), jnp.float32)
    matrix = stack[:, :heads]
    got = jax.jit(product)(PerLayer.of(matrix)[jnp.asarray(1)], x)
    np.testing.assert_allclose(got, np.float64(x) @ np.float64(matrix[1]), atol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 3), (2, 20)])
def test_a_weight_gives_what_its_kernel_gives(stack, shape):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(*shape, 4)), jnp.float32)
    kernel, bias = np.float64(stack[1, 0]), np.arange(5.0, dtype=np.float32)
    weight = PerLayer.of(jnp.swapaxes(stack[:, 0], 1, 2))[jnp.asarray(1)]
    np.testing.assert_allclose(jax.jit(linear)(weight, x), np.float64(x) @ kernel, atol=1e-5)
    got = Dense(5, ("embed", "mlp")).apply({"params": {"weight": weight, "bias": bias}}, x)
    np.testing.assert_allclose(got, np.float64(x) @ kernel + bias, atol=1e-5)


@pytest.mark.parametrize("axis", [-1, -2])
def test_writes_are_those_of_the_stack(stack, axis):
    fresh = jnp.ones_like(stack)[..., :1] if axis == -1 else jnp.ones_like(stack)[..., :1, :]
    expected = np.array(stack)
    expected[(..., 3) if axis == -1 else (..., 3, slice(None))] = 1
    np.testing.assert_array_equal(written(stack, fresh, 3, axis), expected)
    got = jax.jit(lambda old: written(old, fresh, 3, axis))(PerLayer.of(stack, writable=True))
    np.testing.assert_array_equal(jnp.stack(got.layers), expected)


def test_linear_layers_of_one_input_are_one_product():
    block = {"num_heads": 4, "num_kv_heads": 2, "mlp_dim": 12, "activation": "silu", "gated": True, "norm": "rms"}
    stack = TransformerStack(DEPTH, {**block, "norm_epsilon": 1e-6, "qkv_bias": True, "use_bias": True})
    x, context = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 8)), jnp.float32), Context("causal")
    params = nn.meta.unbox(drawn(jax.eval_shape(stack.init, jax.random.key(0), x, context)))["params"]
    apart = per_layer_kernels(params)
    layers = apart["layers"]
    assert {name: set(layers[name]) for name in ("attention", "mlp")} == {
        "attention": {"query_key_value", "out"},
        "mlp": {"gate_up", "down"},
    }
    assert layers["attention"]["query_key_value"]["weight"].shape == (DEPTH, 16, 8)
    apply = jax.jit(lambda params: stack.apply({"params": params}, x, context)[0])
    np.testing.assert_allclose(apply(apart), apply(params), atol=1e-5)


def test_only_kernels_of_scanned_layers_are_taken_out():
    kernel, scale = jnp.arange(DEPTH * 20.0).reshape(DEPTH, 4, 5), jnp.zeros((DEPTH, 4))
    params = {
        "blocks": {"layers": {"mlp": {"up": {"kernel": kernel, "bias": scale}}, "norm": {"scale": scale}}},
        "head": {"kernel": kernel},
    }
    got = per_layer_kernels(params)
    up = got["blocks"]["layers"]["mlp"]["up"]
    assert set(up) == {"weight", "bias"} and isinstance(up["weight"], PerLayer)
    np.testing.assert_array_equal(up["weight"][2], kernel[2].T)
    assert got["blocks"]["layers"]["norm"]["scale"] is scale and got["head"]["kernel"] is kernel

"""Layers as separate arrays: the values of the stack, in and out of a stack of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.layers.attention import Context, KeyValue
from vlm_jax.layers.block import TransformerStack
from vlm_jax.layers.per_layer import PerLayer, joined, layers_apart, of_layers, written

from ..parameters import drawn

DEPTH = 3


@pytest.fixture(scope="module")
def stack():
    return np.random.default_rng(0).normal(size=(DEPTH, 2, 4, 5)).astype(np.float32)


def test_indexing_gives_what_the_stack_gives(stack):
    apart = PerLayer(stack)
    assert apart.shape == stack.shape
    of = of_layers({"a": apart, "b": np.arange(DEPTH)}, 1)
    np.testing.assert_array_equal(of["a"], stack[1])
    assert of["b"] == 1
    for part in (apart[1:], joined(apart[1:2], apart[2:])):
        np.testing.assert_array_equal(np.stack(part.layers), stack[1:])


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("kind", [jnp.asarray, PerLayer])
def test_writes_are_those_of_the_stack(stack, axis, kind):
    place = (..., 3) if axis == -1 else (..., 3, slice(None))
    fresh, expected = np.take(stack, [0], axis) + 1, np.array(stack)
    expected[place] = stack[(..., 0) if axis == -1 else (..., 0, slice(None))] + 1
    np.testing.assert_array_equal(written(jnp.asarray(stack), jnp.asarray(fresh), 3, axis), expected)
    np.testing.assert_array_equal(jnp.stack(written(kind(stack), PerLayer(fresh), 3, axis).layers), expected)


def test_blocks_apart_give_what_the_scan_over_their_stack_gives():
    block = {"num_heads": 4, "num_kv_heads": 2, "mlp_dim": 12, "activation": "silu", "gated": True, "norm": "rms"}
    stack = TransformerStack(
        DEPTH, {**block, "norm_epsilon": 1e-6, "qkv_bias": True, "use_bias": True}, windows=(2, None, 1)
    )
    x, ones = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 8)), jnp.float32), jnp.ones((2, 3), jnp.int32)
    params = nn.meta.unbox(drawn(jax.eval_shape(stack.init, jax.random.key(0), x, Context("causal"))))["params"]
    given = {"layers": {"scale": np.zeros((DEPTH, 4))}, "head": {"kernel": np.zeros((DEPTH, 4))}}
    assert isinstance(layers_apart(given)["head"]["kernel"], np.ndarray)
    past = KeyValue(*(0.1 + jnp.zeros((DEPTH, 2, 2, *shape), jnp.float32) for shape in ((2, 4), (4, 2))))
    context = Context("causal", ones, jnp.ones((2, 7), jnp.int32))

    @jax.jit
    def run(params, cache):
        return stack.apply({"params": params}, x, context, 1, DEPTH, cache=cache, method="run")

    cache = past.part(1, None)
    expected, fresh = run(params, cache)
    for kept in (cache, KeyValue(*map(PerLayer, cache))):
        got, apart = run(layers_apart(params), kept)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        for ours, theirs in zip(apart, fresh, strict=True):
            np.testing.assert_allclose(jnp.stack(ours.layers), theirs, atol=1e-5)

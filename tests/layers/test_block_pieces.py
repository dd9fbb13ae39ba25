"""Pieces of a stack against the whole: the same parameters, values, gradients and caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.costs.flops import count_flops
from vlm_jax.layers.attention import Context, KeyValue
from vlm_jax.layers.block import TransformerStack
from vlm_jax.layers.rope import rope_angles

from ..parameters import drawn

DEPTH, WIDTH = 4, 8
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
ANGLES = rope_angles(jnp.arange(5)[None] * jnp.ones((2, 1), jnp.int32), 4, 100.0)
CONTEXT = Context("causal", SEGMENTS, SEGMENTS, angles=ANGLES)


def in_pieces(stack, x, context, cache=None):
    """Block 0, the halves of block 1, then 2 and 3."""

    def part(start, stop):
        return None if cache is None else jax.tree.map(lambda leaf: leaf[start:stop], cache)

    x, first = stack.run(x, context, 0, 1, cache=part(0, 1))
    x, second, heads = stack.attend(x, context, 1, cache=part(1, 2))
    x = stack.feed_forward(x, 1)
    x, last = stack.run(x, context, 2, DEPTH, cache=part(2, DEPTH))
    if cache is None:
        return x, None, heads
    return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, second, last), heads


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, WIDTH)), jnp.float32)


@pytest.fixture(scope="module")
def params(x):
    return nn.meta.unbox(drawn(jax.eval_shape(TransformerStack(DEPTH, BLOCK).init, jax.random.key(0), x, CONTEXT)))


WINDOWS = (None, 1, 2, 3)


@pytest.mark.parametrize(("remat", "windows"), [("none", ()), ("full", ()), ("none", WINDOWS)])
def test_pieces_give_the_values_and_gradients_of_the_whole(x, params, remat, windows):
    stack = TransformerStack(DEPTH, BLOCK, remat=remat, windows=windows)

    def loss(method, params, x):
        return jnp.sum(jnp.sin(stack.apply(params, x, CONTEXT, method=method)[0]))

    (value, grads), (expected, expected_grads) = (
        jax.jit(jax.value_and_grad(functools.partial(loss, method), argnums=(0, 1)))(params, x)
        for method in (in_pieces, "__call__")
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5), grads, expected_grads)


def test_every_block_has_its_own_window(x, params):
    """A change of the first of five positions gets as far as the windows let it."""
    changed, one = x.at[:, 0].add(1.0), jnp.ones_like(SEGMENTS)
    context = Context("causal", one, one, angles=ANGLES)
    for windows, reach in (((1, 1, 1, 1), 0), ((1, 2, 1, 1), 1), ((2, 1, 3, 1), 3), (WINDOWS, 4), ((1, 1, 1, None), 4)):
        apply = jax.jit(functools.partial(TransformerStack(DEPTH, BLOCK, windows=windows).apply, params))
        moved = np.abs(apply(changed, context)[0] - apply(x, context)[0]).max(axis=(0, 2)) > 1e-6
        assert moved.tolist() == [place <= reach for place in range(5)]


def test_a_window_for_every_block_is_asked_for(x, params):
    with pytest.raises(ValueError, match="windows: expected one for each of 4 blocks, got 2"):
        TransformerStack(DEPTH, BLOCK, windows=(1, 2)).apply(params, x, CONTEXT)


def test_pieces_write_the_cache_of_the_whole(x, params):
    stack, rng = TransformerStack(DEPTH, BLOCK), np.random.default_rng(1)
    shapes = ((DEPTH, 2, 1, 4, 3), (DEPTH, 2, 1, 3, 4))
    past = KeyValue(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))
    held = jnp.concatenate([jnp.asarray([[1, 1, 0], [0, 1, 1]]), SEGMENTS], axis=1)
    context = Context("causal", SEGMENTS, held, angles=ANGLES)
    got, want = (
        jax.jit(functools.partial(stack.apply, method=method))(params, x, context, cache=past)
        for method in (in_pieces, "__call__")
    )
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    for ours, theirs in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(got[2].key.transpose(0, 2, 3, 1), want[1].key[1], atol=1e-5)  # after its rotation


def test_pieces_are_drawn_like_the_whole(x):
    stack = TransformerStack(DEPTH, BLOCK)
    boxes = [
        jax.jit(functools.partial(stack.init, method=method))(jax.random.key(0), x, CONTEXT)
        for method in (in_pieces, "__call__")
    ]
    assert jax.tree.structure(boxes[0]) == jax.tree.structure(boxes[1])
    jax.tree.map(np.testing.assert_array_equal, *boxes)


def test_pieces_cost_what_the_whole_costs(x, params):
    stack = TransformerStack(DEPTH, BLOCK)
    costs = [
        count_flops(lambda p, x, m=method: stack.apply(p, x, CONTEXT, method=m)[0], params, x)
        for method in (in_pieces, "__call__")
    ]
    assert costs[0] == costs[1] > 0


def test_a_run_of_no_blocks_is_nothing(x, params):
    stack = TransformerStack(DEPTH, BLOCK)
    assert stack.apply(params, x, CONTEXT, 2, 2, method="run")[0] is x

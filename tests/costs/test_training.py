"""FLOPs of a gradient against closed forms, and against the jaxpr of the gradient without rematerialisation."""

import jax
import jax.numpy as jnp
import pytest

from vlm_jax.costs.flops import count_flops
from vlm_jax.costs.training import training_flops

M, K, N = 3, 5, 7
ONCE = 2 * M * K * N
X, W = jax.ShapeDtypeStruct((M, K), jnp.float32), jax.ShapeDtypeStruct((K, N), jnp.float32)


def loss(w, x):
    return jnp.tanh(x @ w).sum()


wrapped = jax.custom_vjp(loss)
wrapped.defvjp(lambda w, x: (loss(w, x), (w, x)), lambda kept, g: (kept[0], kept[1]))


@pytest.mark.parametrize("function", [loss, jax.jit(loss), jax.checkpoint(loss), wrapped])
def test_a_product_has_a_gradient_for_each_operand_that_is_trained(function):
    assert training_flops(function, W, X) == 2 * ONCE
    assert training_flops(lambda both: function(*both), (W, X)) == 3 * ONCE


def test_what_no_trained_parameter_reaches_has_none():
    head = jax.ShapeDtypeStruct((N, N), jnp.float32)
    square = 2 * M * N * N
    assert training_flops(lambda head, w, x: ((x @ w) @ head).sum(), head, W, X) == ONCE + 2 * square
    stopped = lambda w, x, head: (jax.lax.stop_gradient(x @ w) @ head).sum() + (x @ w)[0, 0]  # noqa: E731
    assert training_flops(stopped, W, X, head) == 2 * ONCE + square + 2 * ONCE
    # Integers that follow from a trained parameter carry none.
    assert training_flops(lambda w, x: (x @ jnp.argmax(w, axis=1)[:, None].astype(x.dtype)).sum(), W, X) == 2 * M * K


def test_a_scan_counts_every_layer_and_a_branch_the_dearest():
    layers = jax.ShapeDtypeStruct((4, K, K), jnp.float32)

    def run(layers, x):
        return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, layers)[0].sum()

    assert training_flops(run, layers, X) == 4 * 3 * 2 * M * K * K
    # The gradient as JAX makes it, with all of the carry's gradients.
    unrolled = jax.grad(lambda layers, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0].sum())
    assert training_flops(run, layers, X) == count_flops(unrolled, layers, X)

    def either(w, x, flag):
        return jax.lax.cond(flag, lambda: (x @ w @ w.T).sum(), lambda: w.sum())

    assert training_flops(either, W, X, jax.ShapeDtypeStruct((), bool)) == 2 * ONCE + 3 * ONCE


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="while_loop"):
        training_flops(lambda w: jax.lax.while_loop(lambda w: w.sum() < 3, lambda w: w * 2, w).sum(), W)

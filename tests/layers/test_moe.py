"""The mixture of experts against NumPy, its FLOPs, and its experts shared out over a mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.costs.flops import count_flops
from vlm_jax.layers.moe import MixtureOfExperts
from vlm_jax.layers.scan import LOSSES
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.rules import distribute, shardings, use_mesh

from ..advice import tried
from ..parameters import drawn

BATCH, LENGTH, WIDTH, HIDDEN, SHARED = 8, 6, 10, 8, 12
ROUTER = {"num_experts": 8, "num_selected": 3, "normalize": True, "scale": 1.5}


@functools.cache
def made(shared=SHARED, gate=False):
    module = MixtureOfExperts(HIDDEN, shared, ROUTER, shared_gate=gate)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32)
    boxed = drawn(jax.eval_shape(module.init, jax.random.key(0), x))
    return module, boxed, x


def gated(x, gate, up, down):
    hidden = x @ gate
    return (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down


@pytest.mark.parametrize(("shared", "gate"), [(SHARED, False), (SHARED, True), (0, False)])
def test_a_token_is_the_weighted_sum_of_its_experts_and_the_shared_one(shared, gate):
    module, boxed, x = made(shared, gate)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nn.meta.unbox(boxed)["params"])
    got = jax.jit(module.apply)(boxed, x)
    for b, t in np.ndindex(BATCH, LENGTH):
        token = np.asarray(x[b, t], np.float64)
        scores = np.exp(token @ params["router"]["kernel"])
        scores /= scores.sum()
        chosen = np.argsort(scores)[-3:]
        experts = params["experts"]
        expected = sum(
            1.5
            * scores[e]
            / scores[chosen].sum()
            * gated(token, *(experts[name][e] for name in ("gate", "up", "down")))
            for e in chosen
        )
        if shared:
            weight = 1 / (1 + np.exp(-token @ params["shared_gate"]["kernel"])) if gate else 1
            own = gated(token, *(params["shared"][name]["kernel"] for name in ("gate", "up", "down")))
            expected = expected + weight * own
        np.testing.assert_allclose(got[b, t], expected, atol=1e-5)


def test_a_gate_needs_a_shared_feed_forward():
    module, _, x = made(0)
    with pytest.raises(ValueError, match=tried("got shared_dim 0; set shared_dim")):
        jax.eval_shape(module.clone(shared_gate=True).init, jax.random.key(0), x)
    shapes = jax.eval_shape(module.clone(shared_gate=True, shared_dim=4).init, jax.random.key(0), x)
    assert nn.meta.unbox(shapes)["params"]["shared_gate"]["kernel"].shape == (WIDTH, 1)


@pytest.mark.parametrize("gate", [False, True])
def test_counted_flops_are_those_of_the_selected_experts(gate):
    module, boxed, x = made(gate=gate)
    tokens = BATCH * LENGTH
    expected = 2 * tokens * (WIDTH * 8 + 3 * 3 * WIDTH * HIDDEN + 3 * WIDTH * SHARED + gate * WIDTH)
    assert count_flops(module.apply, boxed, x) == expected
    # A step back takes each product twice, once for what it read and once for its kernel.
    back = count_flops(jax.grad(lambda p, x: module.apply(p, x).sum(), argnums=(0, 1)), nn.meta.unbox(boxed), x)
    assert 3 * expected - 2 * tokens * (WIDTH * HIDDEN * 3 + WIDTH * SHARED) <= back <= 3 * expected


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 2, "expert": 4}, {"expert": 8}], ids=str)
def test_no_expert_is_computed_for_tokens_that_it_was_not_given(sizes, monkeypatch):
    """Rows of the blocks that the devices run together: those that were routed, and half a block an expert."""
    module, boxed, x = made(0)
    mesh = make_mesh(MeshSettings(**sizes), devices=jax.devices()[: math.prod(sizes.values())])
    ran = []

    def counted(start, stop, body, init):
        height = jax.tree.leaves(init)[0].shape[1]

        def seen(i, carry):
            jax.debug.callback(lambda: ran.append(height))
            return body(i, carry)

        return loop(start, stop, seen, init)

    loop = jax.lax.fori_loop
    monkeypatch.setattr(jax.lax, "fori_loop", counted)
    placed = jax.device_put(nn.meta.unbox(boxed), shardings(boxed, mesh))
    with use_mesh(mesh):
        jax.block_until_ready(jax.jit(module.apply)(placed, distribute(x, mesh)))
        jax.effects_barrier()
        products, routed = 3, BATCH * LENGTH * 3
        assert products * routed <= sum(ran) <= products * routed * 1.5
        forward = sum(ran)
        jax.block_until_ready(jax.jit(jax.grad(lambda p, x: module.apply(p, x).sum()))(placed, distribute(x, mesh)))
        jax.effects_barrier()
        assert sum(ran) == 3 * forward  # of each product again its own loop, and that of its gradient


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [
        ({"data": 2, "expert": 4}, 4),
        ({"data": 2, "tensor": 2, "expert": 2}, 4),
        ({"context": 2, "fsdp": 2, "expert": 2}, 4),
        ({"data": 1, "expert": 8}, 8),
        ({"data": 8}, 1),
    ],
    ids=str,
)
def test_sharded_equals_unsharded_with_its_gradients(sizes, shares):
    module, boxed, x = made(gate=True)
    mesh = make_mesh(MeshSettings(**sizes))

    def loss(variables, x):
        out, sown = module.apply(variables, x, mutable=[LOSSES])
        return jnp.sin(out).sum() + sum(jax.tree.leaves(sown)), out

    run = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(run)(nn.meta.unbox(boxed), x)
    placed = jax.device_put(nn.meta.unbox(boxed), shardings(boxed, mesh))
    kernel = placed["params"]["experts"]["gate"]
    assert kernel.addressable_shards[0].data.size == kernel.size // shares
    with use_mesh(mesh):
        got = jax.jit(run)(placed, distribute(x, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


def test_devices_hold_no_expert_but_their_own_while_they_compute():
    module, boxed, x = made()
    mesh = make_mesh(MeshSettings(data=2, expert=4))
    placed = jax.device_put(nn.meta.unbox(boxed), shardings(boxed, mesh))
    with use_mesh(mesh):
        text = jax.jit(module.apply).lower(placed, distribute(x, mesh)).compile().as_text()
    assert f"f32[2,{WIDTH},{HIDDEN}]" in text and f"f32[8,{WIDTH},{HIDDEN}]" not in text


def test_experts_that_the_axis_does_not_divide_stay_whole():
    module, x = MixtureOfExperts(HIDDEN, 0, {"num_experts": 6, "num_selected": 2}), made()[2]
    boxed = drawn(jax.eval_shape(module.init, jax.random.key(0), x))
    with use_mesh(make_mesh(MeshSettings(data=2, expert=4))):
        got = jax.jit(module.apply)(nn.meta.unbox(boxed), x)
    np.testing.assert_allclose(got, jax.jit(module.apply)(boxed, x), atol=2e-5)


def test_bfloat16_is_near_to_float32():
    module, boxed, x = made()
    exact, low = jax.jit(module.apply)(boxed, x), jax.jit(module.clone(dtype=jnp.bfloat16).apply)(boxed, x)
    assert low.dtype == jnp.bfloat16
    assert np.linalg.norm(low.astype(jnp.float32) - exact) / np.linalg.norm(exact) < 0.03

"""Counted FLOPs against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu import splash_attention

from vlm_jax.costs import kernels
from vlm_jax.costs.flops import KERNEL, count_flops, products
from vlm_jax.costs.kernels import kernel_flops, visible_flops
from vlm_jax.costs.training import training_flops
from vlm_jax.layers.attention import Context
from vlm_jax.layers.attention.splash import splash
from vlm_jax.layers.block import TransformerStack

from ..advice import tried

M, K, N = 3, 5, 7


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


X, W = shape(M, K), shape(K, N)


def product(x, w):
    return jnp.tanh(x @ w)


def test_products():
    assert count_flops(product, X, W) == 2 * M * K * N
    assert count_flops(lambda x, *, w: x @ w, X, w=W) == 2 * M * K * N
    batched = count_flops(lambda q, k: jnp.einsum("btqh,bsqh->bqts", q, k), shape(2, 3, 4, 5), shape(2, 6, 4, 5))
    assert batched == 2 * 2 * 4 * 3 * 6 * 5
    assert count_flops(lambda x: jnp.exp(x) + x.sum(), X) == 0  # element-wise work is not counted


def test_grouped_products_count_each_row_once():
    def run(x, kernels, sizes):
        return jax.lax.ragged_dot(x, kernels, sizes).sum()

    args = shape(12, K), shape(4, K, N), jax.ShapeDtypeStruct((4,), jnp.int32)
    assert count_flops(run, *args) == 2 * 12 * K * N
    assert count_flops(jax.grad(run, argnums=0), *args) == 2 * 12 * K * N
    assert count_flops(jax.grad(run, argnums=(0, 1)), *args) == 2 * 2 * 12 * K * N


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 2), (4, 1)])
def test_convolutions(groups, stride):
    def run(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    side = (10 - 3) // stride + 1
    expected = 2 * (2 * side * side * 8) * (3 * 3 * 4 // groups)
    assert count_flops(run, shape(2, 10, 10, 4), shape(3, 3, 4 // groups, 8)) == expected


def test_a_scan_counts_every_iteration():
    def run(x, ws):
        return jax.lax.scan(lambda x, w: (product(x, w), None), x, ws)[0]

    assert count_flops(run, shape(M, K), shape(4, K, K)) == 4 * 2 * M * K * K
    nested = lambda x, ws: jax.lax.scan(lambda x, w: (run(x, w), None), x, ws)[0]  # noqa: E731
    assert count_flops(nested, shape(M, K), shape(6, 4, K, K)) == 6 * 4 * 2 * M * K * K


def test_what_no_result_depends_on_is_not_counted():
    def layer(x, w):
        unused = product(x, w)
        return product(x, w), unused

    def run(x, ws):
        unused = product(x, ws[0])
        return jax.lax.scan(layer, x, ws)[0], jax.jit(lambda x: (x, x @ unused.T))(x)[0]

    assert count_flops(run, shape(M, K), shape(4, K, K)) == 4 * 2 * M * K * K


def test_a_loop_of_known_length_is_a_scan():
    assert count_flops(lambda x, w: jax.lax.fori_loop(0, 4, lambda _, x: x @ w, x), X, shape(K, K)) == 4 * 2 * M * K * K


def test_inside_jit_and_custom_derivatives():
    wrapped = jax.custom_vjp(product)
    wrapped.defvjp(lambda x, w: (product(x, w), (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))
    assert count_flops(lambda x, w: jax.jit(product)(x, w) + wrapped(x, w), X, W) == 2 * 2 * M * K * N
    assert count_flops(lambda x, w: jax.nn.relu(x @ w), X, W) == 2 * M * K * N  # relu is a custom_jvp


def test_the_backward_pass_and_what_remat_does_again():
    def loss(function):
        return jax.value_and_grad(lambda w, x: function(x, w).sum())

    once = 2 * M * K * N
    assert count_flops(loss(product), W, X) == 2 * once  # the product, and the kernel's gradient
    assert count_flops(loss(jax.checkpoint(product)), W, X) == 3 * once  # the product twice


def test_branches_count_the_dearest():
    def run(flag, x, w):
        return jax.lax.cond(flag, lambda: x @ w @ w.T, lambda: x)

    assert count_flops(run, jax.ShapeDtypeStruct((), bool), X, W) == 2 * 2 * M * K * N


def test_a_shard_map_counts_every_device():
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")

    def run(x, w):
        return jax.shard_map(
            lambda x, w: x @ w, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec
        )(x, w)

    x = shape(8 * M, K)
    assert count_flops(run, x, W) == 8 * 2 * M * K * N
    assert training_flops(lambda w, x: run(x, w).sum(), W, x) == 2 * 8 * 2 * M * K * N


def test_a_kernel_of_splash_attention_counts_its_products():
    """As the two einsums it stands for: forward once; backward QK' and dO V' again in each of two kernels."""
    heads = splash_attention.MultiHeadMask([splash_attention.CausalMask((256, 256))] * 4)
    kernel = splash_attention.make_splash_mha_single_device(heads)
    x = jax.ShapeDtypeStruct((2, 4, 256, 128), jnp.bfloat16)
    product = 2 * 2 * 4 * 256 * 256 * 128
    assert count_flops(jax.vmap(kernel), x, x, x) == 2 * product
    gradient = jax.grad(lambda *qkv: jax.vmap(kernel)(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    outer = 2 * 2 * 4 * 256 * 128  # each row of the output times its gradient, outside of the kernels
    assert count_flops(gradient, x, x, x) == (2 + 3 + 4) * product + outer


@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "segmented"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_masked_pairs_of_a_kernel_are_not_visible(causal, segmented):
    """In splash attention, forward and backward; in ours, masks are data."""
    segments = (jnp.ones((2, 256), jnp.int32),) * 2 if segmented else None
    x = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)

    def loss(*qkv):
        return splash(*qkv, segments, causal=causal, scale=1.0).astype(jnp.float32).sum()

    kernels = [one for one, _ in products(jax.grad(loss, argnums=(0, 1, 2)), x, x, x) if one.primitive.name == KERNEL]
    share = np.tril(np.ones((256, 256))).mean() if causal else 1
    assert len(kernels) == 3
    for one in kernels:
        assert visible_flops(one, 0.1) == pytest.approx(share * kernel_flops(one))


def test_a_kernel_of_unknown_cost_is_refused(monkeypatch):
    def run(x, **stated):
        out = jax.ShapeDtypeStruct((8, 128), jnp.float32)
        return pl.pallas_call(lambda x, y: None, out, name="mystery", **stated)(x)

    with pytest.raises(
        ValueError, match=tried("the kernel '{mystery}' are unknown; give it a cost_estimate, or add it to")
    ):
        count_flops(run, shape(8, 128))
    stated = pl.CostEstimate(flops=7, transcendentals=0, bytes_accessed=0)
    assert count_flops(functools.partial(run, cost_estimate=stated), shape(8, 128)) == 7
    monkeypatch.setitem(kernels.KERNELS, "mystery", lambda equation: 9)
    assert count_flops(run, shape(8, 128)) == 9


def test_a_while_loop_is_refused():
    def run(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x @ w, x)

    told = tried("the length of a while_loop is unknown; count the FLOPs of its body instead")
    with pytest.raises(ValueError, match=told):
        count_flops(run, shape(M, K), shape(K, K))
    assert count_flops(lambda x, w: x @ w, shape(M, K), shape(K, K)) == 2 * M * K * K


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_transformer_stack(remat):
    """Kaplan et al. 2020, table 1, with grouped keys and a gated feed-forward; backward is twice forward."""
    batch, length, width, heads, kv_heads, head_dim, mlp_dim, depth = 2, 6, 16, 4, 2, 8, 24, 3
    block = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "mlp_dim": mlp_dim,
        "activation": "silu",
        "gated": True,
        "norm": "rms",
        "norm_epsilon": 1e-6,
    }
    stack = TransformerStack(depth, block, remat=remat)
    x = shape(batch, length, width)
    params = nn.meta.unbox(jax.eval_shape(stack.init, jax.random.key(0), x, Context("causal")))
    weights = width * head_dim * (2 * heads + 2 * kv_heads) + 3 * width * mlp_dim
    forward = depth * batch * (2 * length * weights + 2 * 2 * length * length * heads * head_dim)

    def run(params, x):
        return stack.apply(params, x, Context("causal"))[0]

    assert count_flops(run, params, x) == forward
    both = count_flops(jax.grad(lambda p, x: run(p, x).sum(), argnums=(0, 1)), params, x)
    # Attention's weights are computed again in any case. Rematerialised, a block runs again but for its
    # last product, which no gradient needs.
    attention = depth * batch * 4 * length**2 * heads * head_dim
    again = depth * batch * 2 * length * (weights - width * mlp_dim) + attention
    assert both == 3 * forward + attention + (again if remat == "full" else 0)

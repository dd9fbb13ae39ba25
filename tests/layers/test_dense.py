"""Linear layers and tables against NumPy, and the box that carries their names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax import axes
from vlm_jax.layers.dense import Dense, Embed, Named, with_axes

from ..parameters import drawn


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 2, 3, 4)])
def test_dense_is_a_product_and_a_bias(shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    layer = Dense(5, (axes.EMBED, axes.MLP))
    params = drawn(jax.eval_shape(layer.init, jax.random.key(0), jnp.asarray(x)))["params"]
    assert params["kernel"].names == (axes.EMBED, axes.MLP) and params["bias"].names == (axes.MLP,)
    kernel, bias = (np.float64(params[name].value) for name in ("kernel", "bias"))
    out = layer.apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(out, np.float64(x) @ kernel + bias, atol=1e-5)


def test_dense_inside_stored_bounds_which_are_not_learned():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    layer, bounds = Dense(5, (axes.EMBED, axes.MLP), use_bias=False, clips=True), (-0.3, 0.5, -0.2, 0.1)
    params = nn.meta.unbox(layer.init(jax.random.key(0), x)["params"])
    np.testing.assert_allclose(layer.apply({"params": params}, x), x @ params["kernel"], atol=1e-6)  # infinite at first
    params |= dict(zip(("input_min", "input_max", "output_min", "output_max"), map(jnp.float32, bounds), strict=True))
    found = layer.apply({"params": params}, x)
    kernel = np.asarray(params["kernel"])
    np.testing.assert_allclose(found, np.clip(np.clip(x, -0.3, 0.5) @ kernel, -0.2, 0.1), atol=1e-6)
    assert found.min() == np.float32(-0.2) and found.max() == np.float32(0.1)
    gradients = jax.grad(lambda params: layer.apply({"params": params}, x).sum())(params)
    assert gradients.pop("kernel").any() and not any(leaf.any() for leaf in gradients.values())


def test_dense_computes_in_dtype_and_stores_in_param_dtype():
    layer = Dense(5, (axes.EMBED, axes.MLP), dtype=jnp.bfloat16, param_dtype=jnp.float32)
    out, params = jax.jit(layer.init_with_output)(jax.random.key(0), jnp.ones((2, 4)))
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_kernels_keep_the_variance_of_what_they_read():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 512)), jnp.float32)
    out, _ = jax.jit(Dense(512, (axes.EMBED, axes.MLP)).init_with_output)(jax.random.key(0), x)
    assert 0.9 < float(jnp.std(out)) < 1.1


def test_embed_looks_up_and_attends():
    table = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    layer, params = Embed(7, 4, 1.0), {"params": {"embedding": jnp.asarray(table)}}
    ids = jnp.array([[0, 6, 3], [3, 3, 1]])
    np.testing.assert_array_equal(layer.apply(params, ids), table[np.asarray(ids)])
    x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    logits = layer.apply(params, jnp.asarray(x), method="attend")
    np.testing.assert_allclose(logits, np.einsum("btd,vd->btv", x, table), atol=1e-5)


def test_embed_draws_rows_of_the_asked_deviation():
    params = Embed(400, 64, 0.25).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    assert 0.24 < float(jnp.std(nn.meta.unbox(params)["params"]["embedding"])) < 0.26


def test_a_box_opens_to_its_value_and_takes_a_name_for_a_new_axis():
    box = with_axes(nn.initializers.ones, axes.EMBED)(jax.random.key(0), (3,))
    assert isinstance(box, Named)
    np.testing.assert_array_equal(box.unbox(), np.ones(3))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), box).add_axis(0, {nn.PARTITION_NAME: axes.LAYERS})
    assert stacked.names == (axes.LAYERS, axes.EMBED) and stacked.value.shape == (2, 3)

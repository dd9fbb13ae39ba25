import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.encoders.aimv2 import AIMv2

from ..advice import tried
from ..reducers import blocks

ENCODER = AIMv2((10, 10), 2, width=8, depth=3, num_heads=2, mlp_dim=12)
IMAGES = np.random.default_rng(0).normal(size=(2, 10, 10, 3)).astype(np.float32)


@functools.cache
def params():
    shapes = nn.meta.unbox(jax.eval_shape(ENCODER.clone(final_norm=True).init, jax.random.key(0), IMAGES))
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32) * 0.3, shapes)


def encode(**fields):
    return jax.jit(functools.partial(ENCODER.clone(**fields).apply, collect=True))(params(), jnp.asarray(IMAGES))


def test_features_are_the_last_block():
    features = encode()
    assert features.grid == ENCODER.grid(10, 10) == (5, 5) and ENCODER.features == 8
    np.testing.assert_array_equal(features.tokens, features.hidden[-1])


def test_the_final_norm():
    features = encode(final_norm=True)
    x = np.asarray(features.hidden[-1], np.float64)
    scale = params()["params"]["final_norm"]["scale"]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(features.tokens, normed, atol=1e-5)


@pytest.mark.parametrize("select", [0, -2])
def test_select_layer_gives_a_hidden_state_as_it_is(select):
    selected = ENCODER.clone(select_layer=select, final_norm=True)
    shapes = jax.eval_shape(selected.init, jax.random.key(0), IMAGES)["params"]
    assert "final_norm" not in shapes and ("blocks" in shapes) == (select != 0)
    kept = dict(params()["params"])
    kept["blocks"] = jax.tree.map(lambda leaf: leaf[: select % 4], kept["blocks"])
    tokens = jax.jit(selected.apply)({"params": kept}, jnp.asarray(IMAGES)).tokens
    np.testing.assert_allclose(tokens, encode().hidden[select], atol=1e-5)


@pytest.mark.parametrize("kind", ["heads", "joined"])
def test_saliency_is_the_mean_attention_that_is_received_in_the_last_block(kind):
    plain = encode()
    out = jax.jit(ENCODER.clone(saliency=kind).apply)(params(), jnp.asarray(IMAGES))
    np.testing.assert_allclose(out.tokens, plain.tokens, atol=1e-5)  # the features are what they were
    last = jax.tree.map(lambda leaf: np.float64(leaf[-1]), params()["params"]["blocks"]["layers"])
    for image in range(2):
        q, k, _ = blocks.heads(np.float64(plain.hidden[-2][image]), last, 2, 2, 1e-5)
        np.testing.assert_allclose(out.keys[image], k, atol=1e-5)
        if kind == "joined":
            q, k = (x.reshape(len(x), 1, -1) for x in (q, k))
        np.testing.assert_allclose(out.saliency[image], blocks.weights(q, k, 0).mean((0, 1)), atol=1e-6)


def test_saliency_wants_a_block_and_no_collected_states():
    with pytest.raises(
        ValueError, match=tried("saliency is that of a last block, without collected states: leave out `collect`")
    ):
        jax.eval_shape(functools.partial(ENCODER.clone(saliency="heads").apply, collect=True), params(), IMAGES)
    assert jax.eval_shape(ENCODER.clone(saliency="heads").apply, params(), IMAGES).saliency is not None

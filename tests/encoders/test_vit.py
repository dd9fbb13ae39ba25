"""What a ViT's fields do; its numbers are tested by tests/golden and tests/parity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.encoders.vit import ViT

from ..advice import tried

DEPTH = 3
FULL = ViT(
    image_size=(8, 12),
    patch_size=4,
    width=8,
    depth=DEPTH,
    num_heads=2,
    mlp_dim=12,
    class_token=True,
    class_position=True,
    pre_norm=True,
    final_norm="pooled",
    pooling="token",
    projection_dim=5,
)
SELECTED = {"pooling": "none", "projection_dim": None}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12, 3)), jnp.float32)


@functools.cache
def full():
    params = nn.meta.unbox(jax.jit(FULL.init)(jax.random.key(0), IMAGES))
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape, scale=0.4), x.dtype), params)
    return params, jax.jit(functools.partial(FULL.apply, collect=True))(params, IMAGES)


def first_blocks(params, count):
    blocks = jax.tree.map(lambda x: x[:count], params["params"]["blocks"])
    return {"params": {**params["params"], "blocks": blocks}}


def test_features_and_pooled_vector_of_the_whole_model():
    _, out = full()
    assert FULL.grid(8, 12) == out.grid == (2, 3) and FULL.features == 8
    assert out.tokens.shape == (2, 6, 8) and out.pooled.shape == (2, 5) and out.hidden.shape == (4, 2, 7, 8)
    np.testing.assert_array_equal(out.tokens, out.hidden[-1][:, 1:])  # not normalised


@pytest.mark.parametrize("layer", [-4, -2, -1, 0, 1, 3])
@pytest.mark.parametrize("keep", [False, True])
def test_a_selected_layer_is_that_hidden_state_and_later_blocks_are_not_built(layer, keep):
    params, out = full()
    vit = FULL.clone(select_layer=layer, keep_class_token=keep, **SELECTED)
    count = layer if layer >= 0 else DEPTH + 1 + layer
    assert vit.num_blocks == count
    shapes = nn.meta.unbox(jax.eval_shape(vit.init, jax.random.key(0), IMAGES))["params"]
    assert not {"final_norm", "projection"} & shapes.keys() and ("blocks" in shapes) == (count > 0)
    found = jax.jit(vit.apply)(first_blocks(params, count), IMAGES)
    np.testing.assert_allclose(found.tokens, out.hidden[layer][:, 0 if keep else 1 :], atol=1e-5)
    assert found.grid == ((1, 7) if keep else (2, 3)) and found.pooled is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**SELECTED, "select_layer": 4}, "select_layer 4: 3 blocks have the hidden states 0 to 3"),
        ({**SELECTED, "select_layer": -5}, "or -4 to -1"),
        (
            {"select_layer": -2},
            tried("set pooling to 'none' and leave representation_size and projection_dim out"),
        ),
        (SELECTED, "final_norm 'pooled' has nothing to normalise"),
        ({"class_token": False}, tried("class_position and num_registers need a class token; set class_token too")),
        ({"class_token": False, "class_position": False, "num_registers": 2}, "num_registers need a class token"),
        ({"image_size": None}, "need image_size"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(FULL.clone(**fields).init, jax.random.key(0), IMAGES)


def test_fields_that_are_set_as_said_agree():
    for fields in ({"select_layer": -2, **SELECTED, "final_norm": "none"}, {"class_token": True}):
        assert jax.eval_shape(FULL.clone(**fields).init, jax.random.key(0), IMAGES)


def test_a_representation_works_on_every_token_where_nothing_is_pooled():
    params, out = full()
    fields = {"representation_size": 8, "final_norm": "none", "projection_dim": None, "pooling": "none"}
    vit = FULL.clone(**fields)
    assert vit.features == 8
    dense = {"kernel": 2 * jnp.eye(8), "bias": jnp.ones(8)}
    params = {"params": {**params["params"], "representation": dense}}
    found = jax.jit(vit.apply)(params, IMAGES)
    np.testing.assert_allclose(found.tokens, np.tanh(2 * out.tokens + 1), atol=1e-5)


def test_sin_cos_positions_without_an_image_size_count_patches():
    fields = {"position": "sincos", "class_token": False, "class_position": False, "pooling": "gap"}
    counted, stretched = FULL.clone(image_size=None, **fields), FULL.clone(image_size=(16, 24), **fields)
    params = jax.jit(counted.init)(jax.random.key(0), IMAGES)
    same = FULL.clone(image_size=(8, 12), **fields)
    np.testing.assert_array_equal(counted.apply(params, IMAGES).tokens, same.apply(params, IMAGES).tokens)
    assert np.abs(counted.apply(params, IMAGES).tokens - stretched.apply(params, IMAGES).tokens).max() > 1e-3


@pytest.mark.parametrize("layers", [(), (1,), (1, 1)])
@pytest.mark.parametrize("size", [(32, 48), (33, 50)])
def test_the_grid_of_a_hybrid_is_that_of_its_stem(layers, size):
    fields = {"stem_layers": layers, "stem_width": 32, "patch_size": 1, "image_size": (32, 32)}
    vit, image = FULL.clone(**fields), jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    out = jax.eval_shape(lambda x: vit.init_with_output(jax.random.key(0), x)[0], image)
    assert out.grid == vit.grid(*size) and out.tokens.shape[1] == out.grid[0] * out.grid[1]


def test_a_stem_has_whole_groups_of_channels():
    """GroupNorm of Wu and He 2018 with 32 groups, as in vision_transformer's ResNet."""
    vit = FULL.clone(stem_layers=(), stem_width=48, patch_size=1, image_size=(32, 32))
    with pytest.raises(ValueError, match=r"stem_width: expected a multiple of 32, .*got 48"):
        vit.init(jax.random.key(0), IMAGES)

"""What is read out of an encoder, against the same computed in NumPy from its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.analysis.toys import RotaryEncoder, randomised
from vlm_jax.analysis.probe import attention_weights, first_filters, patch_size, position_embeddings
from vlm_jax.encoders.vit import ViT
from vlm_jax.layers.position_embedding import sincos_2d

IMAGES = jax.random.normal(jax.random.key(1), (2, 12, 20, 3))  # 3 rows and 5 columns of patches


def vit(**changes):
    fields = {"image_size": (12, 20), "patch_size": 4, "width": 16, "depth": 3, "num_heads": 4, "mlp_dim": 8}
    module = ViT(**fields | changes)
    params = module.init(jax.random.key(0), jnp.zeros((1, *fields["image_size"], 3)))["params"]
    return module, randomised(params)


def layer_norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)
    return normed * params["scale"] + params["bias"]


def dense(x, params):
    return x @ params["kernel"] + params["bias"]


def split(x, heads):
    return x.reshape(*x.shape[:2], heads, -1)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def layers_of(params, stack="blocks"):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params[stack]["layers"])
    depth = len(jax.tree.leaves(params)[0])
    return [jax.tree.map(lambda x, i=i: x[i], params) for i in range(depth)]


@pytest.mark.parametrize(
    "changes", [{}, {"remat": "dots", "unroll": 3}, {"num_heads": 2}, {"pre_norm": True, "pooling": "map"}]
)
def test_weights_times_values_give_the_output_of_every_block(changes):
    module, params = vit(**changes)
    weights = np.asarray(attention_weights(module, params, IMAGES), np.float64)
    assert weights.shape == (3, 2, module.num_heads, 15, 15)
    hidden = np.asarray(module.apply({"params": params}, IMAGES, collect=True).hidden, np.float64)
    for layer, x, y, w in zip(layers_of(params), hidden[:-1], hidden[1:], weights, strict=True):
        normed = layer_norm(x, layer["attention_norm"])
        attention = layer["attention"]
        q, k, v = (split(dense(normed, attention[n]), module.num_heads) for n in ("query", "key", "value"))
        logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        np.testing.assert_allclose(w, softmax(logits), atol=2e-6)
        x = x + dense(np.einsum("bhqk,bkhd->bqhd", w, v).reshape(x.shape), attention["out"])
        up = dense(layer_norm(x, layer["mlp_norm"]), layer["mlp"]["up"])
        up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        np.testing.assert_allclose(x + dense(up, layer["mlp"]["down"]), y, atol=2e-5)


def turned(x, angles):
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, :, None], np.sin(angles)[:, :, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@pytest.mark.parametrize("pooled", [False, True])
def test_weights_with_rotary_positions_grouped_heads_normed_keys_and_segments(pooled):
    module = RotaryEncoder(pooled=pooled)
    params = randomised(module.init(jax.random.key(0), IMAGES)["params"])
    found = np.asarray(attention_weights(module, params, IMAGES))
    hidden = np.asarray(module.apply({"params": params}, IMAGES, collect=True).hidden, np.float64)
    context = module.context(*hidden.shape[1:3])
    segments = np.asarray(context.query_segments)
    assert found.shape == (2, 2, 4, 15, 15)
    for layer, x, w in zip(layers_of(params, "blocks_0"), hidden[:-1], found, strict=True):
        normed, attention = layer_norm(x, layer["attention_norm"]), layer["attention"]
        rotated = {}
        for name, heads in (("query", 4), ("key", 2)):
            y = split(dense(normed, attention[name]), heads)
            y = y / np.sqrt(np.square(y).mean(-1, keepdims=True) + 1e-6) * attention[f"{name}_norm"]["scale"]
            rotated[name] = turned(y, np.asarray(context.angles))
        keys = np.repeat(rotated["key"], 2, axis=2)
        logits = np.einsum("bqhd,bkhd->bhqk", rotated["query"], keys) / 2
        same = segments[:, None, :, None] == segments[:, None, None, :]
        np.testing.assert_allclose(w, softmax(np.where(same, logits, -np.inf)), atol=2e-6)


def test_weights_in_bfloat16_are_float32_and_near_those_of_float32():
    module, params = vit()
    exact = attention_weights(module, params, IMAGES)
    rounded = attention_weights(module.clone(dtype=jnp.bfloat16), params, IMAGES)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded[0], exact[0], atol=0.03)


def test_an_encoder_without_one_stack_of_attention_is_refused():
    module = RotaryEncoder(stacks=2)
    params = module.init(jax.random.key(0), IMAGES)["params"]
    with pytest.raises(ValueError, match="found blocks_0/layers/attention, blocks_1/layers/attention"):
        attention_weights(module, params, IMAGES)
    module = RotaryEncoder(stacks=0)
    params = module.init(jax.random.key(0), IMAGES)["params"]
    with pytest.raises(ValueError, match=r"RotaryEncoder: .* found none"):
        attention_weights(module, params, IMAGES)


def test_filters_are_the_kernel_of_the_patch_embedding_or_of_the_root_of_a_stem():
    module, params = vit(stem_layers=(1,), stem_width=32, patch_size=1)
    kernel = first_filters(module, params, IMAGES)
    np.testing.assert_array_equal(kernel, params["stem"]["conv_root"]["kernel"])
    module, params = vit()
    np.testing.assert_array_equal(first_filters(module, params, IMAGES), params["patch_embed"]["kernel"])
    with pytest.raises(ValueError, match=r"a layer with a kernel .* found none"):
        first_filters(Plain(), {}, IMAGES)


class Plain(nn.Module):
    """Neither patches nor blocks."""

    def __call__(self, images):
        return images


@pytest.mark.parametrize("image_size", [(12, 20), (16, 16)])
@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_position_embeddings_are_what_the_encoder_adds_to_its_patches(position, image_size):
    module, params = vit(position=position, image_size=image_size)
    found = np.asarray(position_embeddings(module, params, IMAGES))
    assert found.shape == (3, 5, 16)
    kernel, bias = params["patch_embed"]["kernel"], params["patch_embed"]["bias"]
    patches = IMAGES.reshape(2, 3, 4, 5, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 15, -1)
    patches = patches @ kernel.reshape(-1, 16) + bias[None, None]
    inputs = module.apply({"params": params}, IMAGES, collect=True).hidden[0]
    np.testing.assert_allclose(inputs - patches, np.tile(found.reshape(1, 15, 16), (2, 1, 1)), atol=1e-5)
    if position == "learned" and image_size == (12, 20):
        np.testing.assert_array_equal(found.reshape(15, 16), params["positions"]["table"])
    if position == "sincos" and image_size == (12, 20):
        np.testing.assert_allclose(found.reshape(15, 16), sincos_2d((3, 5), 16), atol=1e-6)


@pytest.mark.parametrize("changes", [{"class_token": True, "class_position": True}, {"pre_norm": True}])
@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_position_embeddings_do_not_depend_on_what_stands_around_them(position, changes):
    plain = position_embeddings(*vit(position=position), IMAGES)
    module, params = vit(position=position, **changes)
    if position == "learned":
        params["positions"]["table"] = plain.reshape(15, 16)
    np.testing.assert_allclose(position_embeddings(module, params, IMAGES), plain, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "expected"), [({}, 4), ({"stem_layers": (1, 1), "stem_width": 32, "patch_size": 2}, 16)]
)
def test_the_patch_size_counts_pixels(changes, expected):
    fields = {"image_size": (12, 20), "patch_size": 4, "width": 16, "depth": 3, "num_heads": 4, "mlp_dim": 8}
    module = ViT(**fields | changes)
    assert {patch_size(module, height, 40) for height in (33, 40, 47, 64)} == {expected}


@pytest.mark.parametrize("stacks", [0, 1, 2])
def test_rotary_positions_are_no_embeddings(stacks):
    module = RotaryEncoder(stacks=stacks)
    assert position_embeddings(module, module.init(jax.random.key(0), IMAGES)["params"], IMAGES) is None


def test_what_differs_between_images_is_no_position_embedding():
    module = RotaryEncoder(unit=True)  # the input of the blocks is no longer a sum
    assert position_embeddings(module, module.init(jax.random.key(0), IMAGES)["params"], IMAGES) is None

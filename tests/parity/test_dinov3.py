"""Tiny random DINOv3 of transformers: hidden states at any size, the images of its processor, reducers, and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import vlm_jax
from vlm_jax.analysis.probe import attention_weights
from vlm_jax.analysis.release import analyse_release
from vlm_jax.build.vision import build_encoder
from vlm_jax.checkpoints.hub import read_config
from vlm_jax.layers.rope_2d import centre_angles
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.reducers.tome import ToMe
from vlm_jax.types import TwoSizes

from .processors import SIZES, pictures
from .test_towers import assert_exported, made, relative_error, through_files, to_torch

DEPTH, REGISTERS = 2, 3
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 4,
    "num_register_tokens": REGISTERS,
}
GATED = {**SMALL, "use_gated_mlp": True, "hidden_act": "silu"}
MODELS = {
    "plain": SMALL,
    "gated": GATED,
    "without_biases": {**GATED, "query_bias": False, "value_bias": False, "proj_bias": False, "mlp_bias": False},
    "all_biases": {**SMALL, "key_bias": True, "rope_theta": 20.0, "layer_norm_eps": 1e-3, "num_register_tokens": 0},
    "oblong": {**SMALL, "image_size": [20, 40]},
}


def images_of(height, width):
    return np.random.default_rng(1).normal(size=(2, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("kind", MODELS)
def test_hidden_states_at_another_size_and_back(tmp_path, kind):
    model = made("DINOv3ViTModel", **MODELS[kind])
    ours = through_files(model, tmp_path)
    images = images_of(12, 24)
    with torch.no_grad():
        expected = model(**to_torch(images), output_hidden_states=True)
    module = ours.module.clone(keep_class_token=True)
    found = jax.jit(lambda p, x: module.apply({"params": p}, x, collect=True))(ours.params, jnp.asarray(images))
    assert len(expected.hidden_states) == len(found.hidden) == DEPTH + 1
    for layer, state in enumerate(found.hidden):
        assert relative_error(state, expected.hidden_states[layer]) <= 1e-5
    returned = [0, *range(1 + ours.module.num_registers, expected.last_hidden_state.shape[1])]
    assert len(returned) == 1 + 3 * 6
    assert relative_error(found.tokens, expected.last_hidden_state[:, returned]) <= 1e-5
    assert relative_error(found.pooled, expected.pooler_output) <= 1e-5
    assert_exported(ours, model, tmp_path)


def test_the_names_of_the_release(tmp_path):
    """The hub's files, and those of older versions of transformers, have the blocks at the top."""
    model = made("DINOv3ViTModel", **SMALL)
    model.save_pretrained(tmp_path / "torch")
    stored = safetensors.torch.load_file(tmp_path / "torch" / "model.safetensors")
    images = images_of(20, 20)
    with torch.no_grad():
        expected = model(**to_torch(images)).pooler_output
    renamed = {key.replace("model.layer.", "layer."): value for key, value in stored.items()}
    nested = {(f"model.{key}" if key.startswith("layer.") else key): value for key, value in renamed.items()}
    for tensors in (renamed, nested):
        safetensors.torch.save_file(tensors, tmp_path / "torch" / "model.safetensors", {"format": "pt"})
        ours = vlm_jax.from_pretrained(tmp_path / "torch")
        assert relative_error(jax.jit(ours.apply)(jnp.asarray(images)).pooled, expected) <= 1e-5


def test_angles_are_those_of_the_released_module():
    """A grid that is not square, and the released width of a head."""
    settings = {**SMALL, "hidden_size": 128}
    module = made("DINOv3ViTModel", **settings).rope_embeddings
    module.inv_freq = 1 / 100 ** torch.arange(0, 1, 4 / 64, dtype=torch.float32)
    cos, sin = module(torch.zeros(1, 3, 4 * 37, 4 * 50))
    angles = centre_angles((37, 50), 64, 100.0)
    np.testing.assert_allclose(np.cos(angles), cos.numpy()[:, :32], atol=1e-5)
    np.testing.assert_allclose(np.sin(angles), sin.numpy()[:, 32:], atol=1e-5)


@pytest.mark.parametrize("resample", [2, 3])
def test_photographs_to_features(tmp_path, resample):
    model = made("DINOv3ViTModel", **SMALL)
    processor = transformers.DINOv3ViTImageProcessor(size={"height": 16, "width": 24}, resample=resample)
    through_files(model, tmp_path)
    processor.save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    images = pictures(len(SIZES))
    expected = processor(images, return_tensors="pt")
    batch = ours.processor(images)
    np.testing.assert_allclose(batch.images, expected["pixel_values"].numpy().transpose(0, 2, 3, 1), atol=1e-5)
    with torch.no_grad():
        pooled = model(**expected).pooler_output
    assert relative_error(jax.jit(ours.apply)(jnp.asarray(batch.images)).pooled, pooled) <= 1e-5


def test_another_size_of_images_is_written(tmp_path):
    model = made("DINOv3ViTModel", **SMALL)
    through_files(model, tmp_path)
    transformers.DINOv3ViTImageProcessor(size={"height": 20, "width": 20}).save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch", image_size=28)
    ours.save_pretrained(tmp_path / "ours")
    assert read_config(tmp_path / "ours")["image_size"] == 28
    again = transformers.DINOv3ViTImageProcessor.from_pretrained(tmp_path / "ours")
    images = pictures(2)
    expected = again(images, return_tensors="pt")["pixel_values"].numpy().transpose(0, 2, 3, 1)
    assert expected.shape[1:3] == (28, 28)
    np.testing.assert_allclose(ours.processor(images).images, expected, atol=1e-5)


def test_attention_saliency_and_the_report(tmp_path):
    """The class token's attention of the last block, which reducers rank by, is that of transformers."""
    model = made("DINOv3ViTModel", **SMALL)
    through_files(model, tmp_path)
    transformers.DINOv3ViTImageProcessor(size={"height": 20, "width": 20}).save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    images = images_of(20, 20)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**to_torch(images), output_attentions=True).attentions
    weights = attention_weights(ours.module, ours.params, jnp.asarray(images))
    for layer in range(DEPTH):
        np.testing.assert_allclose(weights[layer], expected[layer].numpy(), atol=1e-5)
    looking = ours.module.clone(saliency="heads")
    saliency = jax.jit(lambda p, x: looking.apply({"params": p}, x).saliency)(ours.params, jnp.asarray(images))
    of_class = expected[-1].mean(dim=1)[:, 0, 1 + REGISTERS :].numpy()
    np.testing.assert_allclose(saliency, of_class, atol=1e-5)
    report = analyse_release(ours, pictures(1), reducers=["visionzip", "tome"], token_budget=12, num_components=4)
    assert report.similarity is None
    assert [one.index.size for one in report.kept] == [12, 12]


def test_merged_tokens_keep_the_angles_of_their_place(tmp_path):
    """Merging of equal patches changes only what rotary positions tell apart: with none merged, nothing."""
    model = made("DINOv3ViTModel", **SMALL)
    ours = through_files(model, tmp_path)
    images = jnp.asarray(images_of(20, 20))
    whole = jax.jit(ours.apply)(images).tokens
    merging = ours.module.clone(merged=(0, 0))
    found = jax.jit(lambda p, x: merging.apply({"params": p}, x).tokens)(ours.params, images)
    np.testing.assert_allclose(found, whole, atol=2e-5)
    schedule = ToMe.for_budget(15, (5, 5), DEPTH)
    fewer = ours.module.clone(**ToMe(**schedule).required_fields()["encoder"])
    assert jax.jit(lambda p, x: fewer.apply({"params": p}, x).tokens)(ours.params, images).shape == (2, 15, 16)


def test_beside_another_tower_from_a_config(tmp_path):
    """Its features and those of SigLIP, at another size with the same grid, joined by channels."""
    sizes = {key: SMALL[key] for key in SMALL if key != "num_register_tokens"} | {"image_size": 10, "patch_size": 2}
    models = made("DINOv3ViTModel", **SMALL), made("SiglipVisionModel", **sizes, vision_use_head=False)
    first, second = (through_files(one, tmp_path / str(i)) for i, one in enumerate(models))
    shared = {"kind": "vit", "width": 16, "depth": DEPTH, "num_heads": 2, "mlp_dim": 24}
    own = {"activation": "gelu", "position": "rotary", "key_bias": False, "layer_scale": 1.0, "norm_epsilon": 1e-5}
    section = {
        "kind": "hybrid",
        "high": {**shared, **own, "patch_size": 4, "class_token": True, "num_registers": REGISTERS},
        "low": {**shared, "patch_size": 2, "image_size": (10, 10)},
        "low_size": 10,
        "combine": "feature",
    }
    encoder = build_encoder(section, "config.encoder", (20, 20), {})
    assert encoder.grid(20, 20) == (5, 5) and encoder.features == 32
    large, small = images_of(20, 20), images_of(10, 10)
    with torch.no_grad():
        high, low = (model(**to_torch(x)) for model, x in zip(models, (large, small), strict=True))
    expected = torch.cat([high.last_hidden_state[:, 1 + REGISTERS :], low.last_hidden_state], dim=2)
    params = {"high": first.params, "low": second.params}
    seen = TwoSizes(jnp.asarray(large), jnp.asarray(small))
    assert relative_error(jax.jit(lambda p, x: encoder.apply({"params": p}, x).tokens)(params, seen), expected) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"query_bias": False}, "query_bias: expected value_bias, True, got False"),
        ({"num_attention_heads": 8}, "num_attention_heads: expected heads of a width that is a multiple of 4"),
        ({"hidden_act": "tanh"}, "hidden_act: expected"),
    ],
)
def test_other_settings_are_refused(tmp_path, settings, message):
    through_files(made("DINOv3ViTModel", **SMALL), tmp_path)
    path = tmp_path / "torch" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(PretrainedError, match=message):
        vlm_jax.from_pretrained(tmp_path / "torch")


def test_a_processor_with_another_filter_is_refused(tmp_path):
    through_files(made("DINOv3ViTModel", **SMALL), tmp_path)
    path = tmp_path / "torch" / "preprocessor_config.json"
    path.write_text('{"resample": 0}')
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    with pytest.raises(PretrainedError, match="resample: expected 2 or 3, got 0"):
        ours.processor(pictures(1))
    path.write_text('{"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": true}')
    with pytest.raises(PretrainedError, match="size: expected height and width"):
        vlm_jax.from_pretrained(tmp_path / "torch").processor(pictures(1))
    path.write_text('{"size": {"height": 16, "width": 16}}')
    assert vlm_jax.from_pretrained(tmp_path / "torch").processor(pictures(1)).images.shape == (1, 16, 16, 3)

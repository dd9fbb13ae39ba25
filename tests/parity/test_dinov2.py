"""Tiny random DINOv2 of transformers, with and without registers: hidden states, positions at other sizes, and back."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

import vlm_jax

from .processors import SIZES, pictures
from .test_towers import assert_exported, made, relative_error, through_files, to_torch

DEPTH, REGISTERS = 2, 3
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 4,
    "mlp_ratio": 2,
}
GATED = {**SMALL, "use_swiglu_ffn": True, "qkv_bias": False}
MODELS = {
    "plain": ("Dinov2Model", SMALL),
    "gated": ("Dinov2Model", {**GATED, "use_mask_token": False}),
    "registers": ("Dinov2WithRegistersModel", {**GATED, "num_register_tokens": REGISTERS}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_hidden_states_at_another_size_and_back(tmp_path, kind):
    """A table of 5x5 positions is interpolated to 3x6: down in rows, where antialiasing differs, and up in columns."""
    name, settings = MODELS[kind]
    model = made(name, **settings)
    ours = through_files(model, tmp_path)
    images = np.random.default_rng(1).normal(size=(2, 12, 24, 3)).astype(np.float32)
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


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Dinov2ForImageClassification", SMALL),
        ("Dinov2WithRegistersForImageClassification", {**SMALL, "num_register_tokens": REGISTERS}),
    ],
)
def test_a_photograph_to_classes_and_back(tmp_path, name, settings):
    """Images are smaller than the table's, as in the release (224 of 518 pixels)."""
    model = made(name, **settings, num_labels=5)
    processor = BitImageProcessorPil(
        size={"shortest_edge": 16},
        crop_size={"height": 12, "width": 12},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    ours = through_files(model, tmp_path)
    processor.save_pretrained(tmp_path / "torch")
    images = pictures(len(SIZES))
    expected = processor(images, return_tensors="pt")
    batch = ours.processor(images)
    np.testing.assert_allclose(batch.images, expected["pixel_values"].numpy().transpose(0, 2, 3, 1), atol=1e-5)
    with torch.no_grad():
        logits = model(**expected).logits
    assert relative_error(ours.logits(batch), logits) <= 1e-5
    assert_exported(ours, model, tmp_path)


def test_the_position_table_is_resized_as_registers_need_it(tmp_path):
    model = made("Dinov2WithRegistersModel", **SMALL, num_register_tokens=REGISTERS)
    through_files(model, tmp_path)
    images = np.random.default_rng(1).normal(size=(1, 12, 12, 3)).astype(np.float32)
    ours = vlm_jax.from_pretrained(tmp_path / "torch", image_size=12)
    assert ours.config["image_size"] == 12
    ours.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        expected = model(**to_torch(images)).pooler_output
        found = transformers.Dinov2WithRegistersModel.from_pretrained(tmp_path / "ours")(**to_torch(images))
    torch.testing.assert_close(found.pooler_output, expected, rtol=1e-5, atol=1e-5)


def test_an_onnx_export_of_the_tower_is_read_back(tmp_path):
    """As torch's exporter writes it: weights of products transposed and numbered, the position table in two halves."""
    path = pathlib.Path(__file__).parents[2] / "experiments" / "real_tower" / "convert.py"
    spec = importlib.util.spec_from_file_location("real_tower_convert", path)
    convert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(convert)
    model = made("Dinov2Model", **SMALL, use_mask_token=False)
    model.save_pretrained(tmp_path / "torch")
    released = safetensors.numpy.load_file(tmp_path / "torch" / "model.safetensors")
    tensors, nodes = {"decoder.bias": np.ones(2), "onnx::MatMul_7": np.ones((2, 2))}, []
    nodes.append(convert.Node("MatMul", "/decoder/MatMul", ("x", "onnx::MatMul_7")))
    for number, (key, value) in enumerate(released.items(), 100):
        module = f"/backbone/{key.rpartition('.')[0]}".replace(".", "/").replace("layer/", "layer.")
        if key == "embeddings.position_embeddings":
            tensors |= {"onnx::Concat_1": value[:, :1], "onnx::Reshape_2": value[:, 1:]}
            nodes.append(convert.Node("Concat", "/backbone/embeddings/Concat_6", ("onnx::Concat_1", "x")))
            nodes.append(convert.Node("Reshape", "/backbone/embeddings/Reshape_1", ("onnx::Reshape_2", "x")))
        elif key.startswith("encoder") and value.ndim == 2:
            tensors[f"onnx::MatMul_{number}"] = value.T
            nodes.append(convert.Node("MatMul", f"{module}/MatMul", ("x", f"onnx::MatMul_{number}")))
        else:
            tensors[f"backbone.{key}"] = value
    found = convert.released_tensors(tensors, nodes)
    assert found.keys() == released.keys()
    for key, value in released.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    convert.write(tmp_path / "written", found, SMALL["num_attention_heads"])
    config = json.loads((tmp_path / "written" / "config.json").read_text())
    assert {key: config[key] for key in SMALL} == SMALL
    images = np.random.default_rng(1).normal(size=(1, 20, 20, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(**to_torch(images)).pooler_output
    pooled = jax.jit(vlm_jax.from_pretrained(tmp_path / "written").apply)(jnp.asarray(images)).pooled
    assert relative_error(pooled, expected) <= 1e-5
    with pytest.raises(ValueError, match="expected both halves of the position table, got patches"):
        convert.released_tensors(tensors, [node for node in nodes if node.op != "Concat"])

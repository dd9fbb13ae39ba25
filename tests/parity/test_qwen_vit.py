"""Towers and mergers of Qwen-VLs and Qwen2.5-Omni compared with transformers: loaded, applied, written back."""

import functools
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniVisionEncoder
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import get_vision_window_index

import vlm_jax
from vlm_jax.pretrained.composition import visual_half
from vlm_jax.pretrained.qwen2_vl import packed_shapes, qwen2_5_visual, qwen2_visual
from vlm_jax.processors.patches import pack_patches, patchify

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "bos_token_id": 5,
    "eos_token_id": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
}
IDS = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
VISION = {"num_heads": 4, "patch_size": 4, "hidden_size": 32}
SYSTEMS = {
    "qwen2_vl": (
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig,
        {**VISION, "depth": 3, "embed_dim": 48, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        {
            **VISION,
            "depth": 5,
            "intermediate_size": 40,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
        },
    ),
    "qwen2_5_omni_thinker": (
        Qwen2_5OmniThinkerForConditionalGeneration,
        functools.partial(
            Qwen2_5OmniThinkerConfig,
            audio_config={"encoder_layers": 1, "d_model": 16, "encoder_attention_heads": 2, "encoder_ffn_dim": 8},
        ),
        {
            **VISION,
            "depth": 3,
            "intermediate_size": 40,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": (
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        {
            **VISION,
            "depth": 4,
            "intermediate_size": 40,
            "out_hidden_size": 32,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [2, 0],
        },
    ),
}
# Images of several sizes, one smaller than a window, and a video of three temporal patches.
GRIDS = [(1, 6, 4), (3, 4, 10), (1, 2, 2), (1, 8, 8)]


@functools.cache
def made(system):
    """A model with random values everywhere: fresh biases and scales are constants, and hide a mix-up."""
    cls, config, vision = SYSTEMS[system]
    torch.manual_seed(0)
    model = cls(config(text_config=TEXT, vision_config=vision, **IDS)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "visual" in name:
                parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.5)
    return model


@pytest.fixture(params=SYSTEMS)
def saved(request, tmp_path):
    """The model and the folder that transformers saved it to."""
    made(request.param).save_pretrained(tmp_path / "torch")
    return made(request.param), tmp_path / "torch"


def patches_of(config):
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    count = int(np.prod(GRIDS, axis=1).sum())
    return np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)


def reference(tower, patches):
    """Outputs of every block and of the mergers; the blocks' in the processor's order."""
    states = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: states.append(output)) for block in tower.blocks
    ]
    grids = torch.tensor(GRIDS)
    with torch.no_grad():
        output = tower(torch.from_numpy(patches), grids)
        merged = torch.cat([output.pooler_output, *(output.get("deepstack_features") or ())], dim=-1).numpy()
    for hook in hooks:
        hook.remove()
    config, states = tower.config, torch.stack(states).numpy()
    if hasattr(config, "window_size"):
        index, _ = get_vision_window_index(grids, config.spatial_merge_size, config.window_size, config.patch_size)
        blocks = states.reshape(len(states), len(index), -1)
        states = blocks[:, np.argsort(index.numpy())].reshape(states.shape)
    return states, merged


def apply(model, patches, **more):
    """States of the blocks, and the connector's tokens."""
    encoder, connector = model.module.encoder, model.module.connector
    packed = pack_patches(patches, GRIDS, merge_size=encoder.merge_size, window=encoder.window, **more)

    @jax.jit
    def run(params, packed):
        features = encoder.apply({"params": params["encoder"]}, packed, collect=True)
        tokens = connector.apply({"params": params["connector"]}, features, deterministic=True)
        return features, tokens, model.module.apply({"params": params}, packed, method="visual_tokens")

    features, tokens, whole = run(model.params, packed)
    assert connector.num_tokens(features.grid) == tokens.tokens.shape[1]
    jax.tree.map(np.testing.assert_array_equal, whole, tokens)
    levels = [] if tokens.levels is None else [tokens.levels]
    every = np.concatenate([tokens.tokens, *levels], axis=-1)
    return features.hidden[1:, 0, : len(patches)], every[0][tokens.mask[0]]


def error(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def check(model, tower, **more):
    patches = patches_of(tower.config)
    states, merged = reference(tower, patches)
    ours, tokens = apply(model, patches, **more)
    assert ours.shape == states.shape and tokens.shape == merged.shape
    assert error(ours[0], states[0]) <= 1e-5
    assert error(ours[-1], states[-1]) <= 1e-4
    assert error(tokens, merged) <= 1e-4


@pytest.mark.parametrize("length", [None, 512])
def test_images_and_a_video_in_one_sequence(saved, length):
    model, folder = saved
    check(vlm_jax.from_pretrained(folder), model.model.visual, length=length)


def test_written_back_transformers_loads_it(saved, tmp_path):
    model, folder = saved
    ours = vlm_jax.from_pretrained(folder)
    ours.save_pretrained(tmp_path / "ours")
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    patches = patches_of(model.model.visual.config)
    for before, after in zip(
        reference(model.model.visual, patches), reference(again.model.visual, patches), strict=True
    ):
        np.testing.assert_array_equal(before, after)
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


@pytest.mark.parametrize(
    ("system", "tower"),
    [
        ("qwen2_vl", Qwen2VisionTransformerPretrainedModel),
        ("qwen2_5_vl", Qwen2_5_VisionTransformerPretrainedModel),
        ("qwen2_5_omni_thinker", Qwen2_5OmniVisionEncoder),
        ("qwen3_vl", Qwen3VLVisionModel),
    ],
)
def test_a_tower_alone(system, tower, tmp_path):
    visual = made(system).model.visual
    visual.save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    check(ours, visual)
    ours.save_pretrained(tmp_path / "ours")
    again, report = tower.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(tensor, visual.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_names_of_other_versions(saved):
    """Some versions save `model.visual.`; the first releases say in_chans, and no rope_parameters."""
    model, folder = saved
    path = folder / "model.safetensors"
    renamed = {f"model.{key}" if key.startswith("visual.") else key: x for key, x in load_file(path).items()}
    save_file(renamed, path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["in_chans"] = config["vision_config"].pop("in_channels")
    del config["vision_config"]["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    check(vlm_jax.from_pretrained(folder), model.model.visual)


@pytest.mark.parametrize("frames", [1, 3])
def test_patches_are_those_of_the_released_processor(frames):
    """The processor takes images alone; a still video is one, over and over."""
    image = np.random.default_rng(0).integers(0, 255, size=(56, 112, 3), dtype=np.uint8)
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4])
    processor = Qwen2VLImageProcessorPil(
        do_resize=False, image_mean=mean.tolist(), image_std=std.tolist(), patch_size=14, merge_size=2
    )
    expected = processor([image], return_tensors="np")
    still = np.repeat(((image / 255 - mean) / std).astype(np.float32)[None], frames, axis=0)
    patches, grid = patchify(still, patch_size=14, temporal_patch_size=2, merge_size=2)
    times = -(-frames // 2)
    assert grid == (times, *expected["image_grid_thw"][0][1:])
    np.testing.assert_allclose(patches, np.tile(expected["pixel_values"], (times, 1)), atol=1e-5)


@pytest.mark.parametrize(
    ("tower", "config", "visual"),
    [
        (Qwen2VisionTransformerPretrainedModel, Qwen2VLVisionConfig(hidden_size=1536), qwen2_visual),
        (
            Qwen2_5_VisionTransformerPretrainedModel,
            Qwen2_5_VLVisionConfig(hidden_size=1280, out_hidden_size=3584),
            qwen2_5_visual,
        ),
        (
            Qwen2_5_VisionTransformerPretrainedModel,
            Qwen2_5_VLVisionConfig(hidden_size=1280, out_hidden_size=2048),
            qwen2_5_visual,
        ),
    ],
)
def test_real_sizes_have_as_many_parameters(tower, config, visual):
    with torch.device("meta"):
        theirs = sum(parameter.numel() for parameter in tower(config).parameters())
    encoder, connector = visual(config.to_dict(), "vision_config")
    packed = packed_shapes(encoder.patch_dim, encoder.merge_size, encoder.window)
    shapes = visual_half(encoder, connector, packed, ()).boxed_shapes()
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == theirs

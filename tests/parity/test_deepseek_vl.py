"""Towers and aligners of tiny random DeepSeek-VL models of transformers, through files, rules and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
)

import vlm_jax

SAM = {
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 4,
    "window_size": 2,
    "global_attn_indexes": [1, 3],
}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 12,
}
CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def randomised(model):
    with torch.no_grad():  # biases, position tables and the branch's scale are constants when fresh
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


def relative_error(ours, theirs):
    theirs = theirs.numpy()
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def normalised(pixels, mean, std):
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (mean, std))
    return (pixels - mean) / std


@pytest.fixture(scope="module")
def hybrid():
    torch.manual_seed(0)
    config = DeepseekVLHybridConfig(vision_config=SIGLIP, high_res_vision_config=SAM, text_config=LLAMA)
    return randomised(DeepseekVLHybridForConditionalGeneration(config))


def check_export(ours, model, folder):
    ours.save_pretrained(folder)
    again, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_both_towers_and_the_aligner_of_the_hybrid_and_back(tmp_path, hybrid):
    hybrid.save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    images = np.random.default_rng(1).uniform(size=(2, 20, 20, 3)).astype(np.float32)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2))
    small = functional.interpolate(pixels, size=(12, 12), mode="bilinear", antialias=True)
    half = ((0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        expected = hybrid.model.get_image_features(
            normalised(small, *half), normalised(pixels, *CLIP_STATISTICS), return_dict=True
        )

    @jax.jit
    def run(params, images):
        features = ours.module.encoder.apply({"params": params["encoder"]}, images)
        return features, ours.module.apply({"params": params}, images, method="visual_tokens")

    (high, low), tokens = run(ours.params, jnp.asarray(images))
    assert high.grid == low.grid == (3, 3)
    assert relative_error(high.tokens, expected.high_res_vision_last_hidden_state) <= 1e-4
    assert relative_error(low.tokens, expected.last_hidden_state) <= 1e-4
    assert relative_error(tokens.tokens, expected.pooler_output) <= 1e-4
    check_export(ours, hybrid, tmp_path / "ours")


def test_siglip_and_its_aligner_and_back(tmp_path):
    torch.manual_seed(0)
    config = DeepseekVLConfig(vision_config=SIGLIP, text_config=LLAMA)
    model = randomised(DeepseekVLForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    images = np.random.default_rng(1).normal(size=(2, 12, 12, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model.model.get_image_features(torch.from_numpy(images.transpose(0, 3, 1, 2)), return_dict=True)
    encoder = ours.module.encoder.apply({"params": ours.params["encoder"]}, jnp.asarray(images))
    assert relative_error(encoder.tokens, expected.last_hidden_state) <= 1e-4
    found = jax.jit(functools.partial(ours.apply, method="visual_tokens"))(jnp.asarray(images))
    assert relative_error(found.tokens, expected.pooler_output) <= 1e-4
    check_export(ours, model, tmp_path / "ours")

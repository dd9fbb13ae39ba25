"""The port of Ovis 2 in transformers compared with ours: visual tokens, indicators, and files there and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Ovis2Config, Ovis2ForConditionalGeneration

import vlm_jax

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vocab_size": 21,
    "hidden_stride": 2,
    "num_visual_indicator_tokens": 5,
}
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}


@pytest.fixture(params=["softmax", "st_argmax"])
def model(request):
    torch.manual_seed(0)
    config = Ovis2Config(
        vision_config={**VISION, "tokenize_function": request.param}, text_config=TEXT, hidden_size=12, vocab_size=32,
        image_token_id=20, visual_indicator_token_ids=[21, 22, 23, 24, 25],
    )  # fmt: skip
    made = Ovis2ForConditionalGeneration(config)
    with torch.no_grad():  # scales are constants when fresh
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made.eval()


def test_visual_tokens_and_indicators_and_back(model, tmp_path):
    model.save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    images = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model.get_image_features(torch.from_numpy(images.transpose(0, 3, 1, 2)), return_dict=True)
    found = jax.jit(functools.partial(ours.apply, method="visual_tokens"))(jnp.asarray(images)).tokens
    theirs = expected.pooler_output.numpy()
    assert found.shape == theirs.shape == (2, 4, 12)
    assert np.abs(found - theirs).max() <= 1e-4 * np.abs(theirs).max()
    rows = ours.module.connector.apply({"params": ours.params["connector"]}, method="indicators")
    np.testing.assert_array_equal(rows, expected.visual_indicator_features.numpy())

    ours.save_pretrained(tmp_path / "ours")
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key

"""A tiny random SAM of transformers, through files, rules and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import SamConfig, SamModel, SamVisionConfig, SamVisionModel

import vlm_jax

# Rows and columns of patches (5) are not a multiple of the window (2); three kinds of runs of blocks.
TINY = {
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 4,
    "mlp_ratio": 2.5,
    "window_size": 2,
    "global_attn_indexes": [2, 4],
}


def randomised(model):
    with torch.no_grad():  # biases, scales and position tables are constants when fresh
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


def relative_error(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("whole", [False, True])
def test_image_encoder_layer_by_layer_and_back(tmp_path, whole):
    torch.manual_seed(0)
    if whole:
        parts = {
            "prompt_encoder_config": {"hidden_size": 8, "image_size": 20, "patch_size": 4},
            "mask_decoder_config": {
                "hidden_size": 8,
                "num_attention_heads": 2,
                "mlp_dim": 8,
                "iou_head_hidden_dim": 8,
            },
        }
        model = randomised(SamModel(SamConfig(vision_config={**TINY, "num_pos_feats": 4}, **parts)))
    else:
        model = randomised(SamVisionModel(SamVisionConfig(**TINY)))
    model.save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")

    images = np.random.default_rng(1).normal(size=(2, 20, 20, 3)).astype(np.float32)
    encoder = model.vision_encoder
    with torch.no_grad():
        expected = encoder(torch.from_numpy(images.transpose(0, 3, 1, 2)), output_hidden_states=True)
    found = jax.jit(lambda x: ours.apply(x, collect=True))(jnp.asarray(images))
    assert found.grid == (5, 5) and ours.module.features == 8
    states = [state.reshape(2, 25, 16).numpy() for state in expected.hidden_states]
    assert len(states) == len(found.hidden) == 6
    assert relative_error(found.hidden[1], states[1]) <= 1e-5
    for mine, theirs in zip(found.hidden, states, strict=True):
        assert relative_error(mine, theirs) <= 1e-4
    neck = expected.last_hidden_state.permute(0, 2, 3, 1).reshape(2, 25, 8).numpy()
    assert relative_error(found.tokens, neck) <= 1e-4

    ours.save_pretrained(tmp_path / "ours")
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_parameters_of_the_base_encoder_are_counted_as_transformers_counts_them():
    with torch.device("meta"):
        theirs = sum(parameter.numel() for parameter in SamVisionModel(SamVisionConfig()).parameters())
    assert theirs == 89_670_912  # the number that tests/encoders/test_sam.py holds ours to

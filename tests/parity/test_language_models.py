"""Tiny random language models of transformers: logits through files and rules, and the way back."""

import jax
import numpy as np
import pytest
import torch
import transformers

import vlm_jax
from vlm_jax.types import Batch

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Sequences here are longer than the 8 positions of training.
ORIGINAL = {"original_max_position_embeddings": 8}
SCALED = {
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 500.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "rope_theta": 100.0,
            **ORIGINAL,
        }
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}},
    "yarn, all settings": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 2.0,
            "beta_slow": 0.5,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
            "truncate": False,
            "rope_theta": 10.0,
            **ORIGINAL,
        }
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "long_factor": [1.5, 3.0, 5.0, 8.0],
            **ORIGINAL,
        },
    },
}
# class of the model, and what its config says beside the sizes
MODELS = {
    "llama": (transformers.LlamaForCausalLM, {}),
    "llama, tied": (transformers.LlamaForCausalLM, {"tie_word_embeddings": True}),
    **{f"llama, {name}": (transformers.LlamaForCausalLM, settings) for name, settings in SCALED.items()},
    "qwen2": (transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3ForCausalLM, {"head_dim": 12}),
}
LENGTH = 12


def made(name):
    """A model of transformers with random parameters, biases and scales among them."""
    cls, settings = MODELS[name]
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**SIZES, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def text(length=LENGTH, rows=2):
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], size=(rows, length), dtype=np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return Batch(ids, positions, np.ones_like(ids), np.full_like(ids, -1))


def their_logits(model, ids, **inputs):
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long), **inputs).logits.numpy()


def check(ours, theirs):
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_back(name, tmp_path):
    model, batch = made(name), text()
    model.save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    expected = their_logits(model, batch.tokens)
    check(jax.jit(ours.apply)(batch), expected)
    ours.save_pretrained(tmp_path / "ours")
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(their_logits(again, batch.tokens), expected)

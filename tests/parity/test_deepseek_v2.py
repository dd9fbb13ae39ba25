"""Tiny random DeepSeek-V2 models of transformers: logits through files and rules, the compressed cache, and back."""

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
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "topk_method": "greedy",
    "max_position_embeddings": 64,
}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
# what a config says beside the sizes
MODELS = {
    "greedy": {},
    "query latent": {"q_lora_rank": 12},
    "groups": {**GROUPS, "routed_scaling_factor": 2.5},
    "query latent, groups": {**GROUPS, "q_lora_rank": 12, "attention_bias": True},
    "no dense layer, tied": {"first_k_dense_replace": 0, "tie_word_embeddings": True},
}
LENGTH = 12


def made(name):
    """A model of transformers with random parameters, biases and scales among them."""
    torch.manual_seed(1)  # with 0 two experts are so near that rounding chooses
    model = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**{**SIZES, **MODELS[name]})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def text(length=LENGTH, rows=2):
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], size=(rows, length), dtype=np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return Batch(ids, positions, np.ones_like(ids), np.full_like(ids, -1))


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long)).logits.numpy()


def check(ours, theirs):
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """Their model, and ours from its files."""
    folder = tmp_path_factory.mktemp("torch")
    model = made(request.param)
    model.save_pretrained(folder)
    return model, vlm_jax.from_pretrained(folder)


def test_logits_and_back(pair, tmp_path):
    model, ours = pair
    batch = text()
    expected = their_logits(model, batch.tokens)
    check(jax.jit(ours.apply)(batch), expected)
    ours.save_pretrained(tmp_path / "ours")
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(their_logits(again, batch.tokens), expected)


def test_decoding_from_the_compressed_cache(pair):
    model, ours = pair
    batch, prompt = text(), 5
    expected = their_logits(model, batch.tokens)
    start = Batch(*(x[:, :prompt] for x in (batch.tokens, batch.positions, batch.segment_ids, batch.visual_index)))
    logits, cache = jax.jit(lambda b: ours.apply(b, LENGTH, method="prefill"))(start)
    assert sum(leaf.size for leaf in jax.tree.leaves(cache.layers)) == 3 * 2 * LENGTH * (16 + 4)  # nothing a head
    check(logits, expected[:, prompt - 1])
    step = jax.jit(lambda tokens, positions, cache: ours.apply(tokens, positions, cache, method="extend"))
    for i in range(prompt, LENGTH):
        logits, cache = step(batch.tokens[:, i : i + 1], batch.positions[:, i : i + 1], cache)
        check(logits, expected[:, i])

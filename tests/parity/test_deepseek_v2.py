"""Tiny random DeepSeek-V2 models of transformers: logits through files and rules, the cache, greedy ids, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import vlm_jax
from vlm_jax.generation.engine import generate
from vlm_jax.pretrained import FAMILIES
from vlm_jax.types import Batch

from .language import NEW, batch_of, check, prompts, their_logits, theirs
from .language import SIZES as LLAMA_SIZES

VOCAB = LLAMA_SIZES["vocab_size"]  # that of the prompts

SIZES = {
    "vocab_size": VOCAB,
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
# settings of a config other than the sizes
MODELS = {
    "greedy": {},
    "query latent": {"q_lora_rank": 12, "hidden_act": "gelu"},
    "groups": {**GROUPS, "routed_scaling_factor": 2.5},
    "query latent, groups": {**GROUPS, "q_lora_rank": 12, "attention_bias": True},
    "no dense layer, tied": {"first_k_dense_replace": 0, "tie_word_embeddings": True},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 2.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 1.2,
        }
    },
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


def test_greedy_ids_of_ragged_batches_and_one_by_one(pair):
    model, ours = pair
    rows = prompts()
    expected = [theirs(model, row) for row in rows]

    def ids(batch):
        return generate(ours.module, ours.params, batch, max_new_tokens=NEW).tokens.tolist()

    assert ids(batch_of(rows, "left")) == expected
    if model.config.q_lora_rank:  # those with it will do
        assert [ids(batch_of([row], "left"))[0] for row in rows] == expected


SHARED = {"vocab_size": 129_280, "q_lora_rank": None, "num_experts_per_tok": 6, "n_shared_experts": 2} | {
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# The language sections of DeepSeek-VL2's releases; with the tower's 0.43 B the model cards' 3.4, 16.1 and 27.5 B. Small
# has DeepSeek-V2-Lite's vocabulary and its 15,706,484,224 parameters.
RELEASES = {
    "tiny": {"hidden_size": 1280, "intermediate_size": 6848, "moe_intermediate_size": 896, "n_routed_experts": 64}
    | {"num_hidden_layers": 12, "num_attention_heads": 10, "num_key_value_heads": 10, "use_mla": False}
    | {"kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0, "topk_method": "greedy"},
    "small": {"hidden_size": 2048, "intermediate_size": 10_944, "moe_intermediate_size": 1408, "n_routed_experts": 64}
    | {"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "topk_method": "greedy"}
    | {"vocab_size": 102_400},
    "base": {"hidden_size": 2560, "intermediate_size": 12_288, "moe_intermediate_size": 1536, "n_routed_experts": 72}
    | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.0},
}
CLASS_DEFAULTS = {"num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 32}  # of the release


def their_count(name):
    """By transformers' model on the meta device, which has no plain attention and no bias that selects."""
    settings = {**CLASS_DEFAULTS, **SHARED, **RELEASES[name]}
    latent = {key: value for key, value in settings.items() if settings.get("use_mla", True) or value not in (None, 0)}
    config = transformers.DeepseekV2Config(**{**latent, "topk_method": "greedy", "q_lora_rank": None})
    width, layers = config.hidden_size, config.num_hidden_layers
    with torch.device("meta"):
        model = transformers.DeepseekV2ForCausalLM(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if not settings.get("use_mla", True):
        attention = [layer.self_attn.parameters() for layer in model.model.layers]
        count += layers * 4 * width**2 - sum(p.numel() for own in attention for p in own)
    if settings["topk_method"] == "noaux_tc":
        count += (layers - 1) * config.n_routed_experts
    return count


@pytest.mark.parametrize("name", RELEASES)
def test_the_released_sizes_have_as_many_parameters(name):
    config = {"model_type": "deepseek_v2", **SHARED, **RELEASES[name]}
    description = FAMILIES["deepseek_v2"](config, {}, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(description.module.init, jax.random.key(0), *description.inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == their_count(name)

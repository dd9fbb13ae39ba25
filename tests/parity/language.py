"""Tiny random language models of transformers, and their greedy ids."""

import numpy as np
import torch
import transformers

import vlm_jax
from vlm_jax.checkpoints.saving import save_checkpoint
from vlm_jax.types import Batch

SIZES = {
    "vocab_size": 97,
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


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


QWEN3_5 = {
    "head_dim": 16,
    "num_hidden_layers": 5,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
}


# class of the model, and what its config says beside the sizes
MODELS = {
    "llama": (transformers.LlamaForCausalLM, {}),
    "llama, tied": (transformers.LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama, biases": (
        transformers.LlamaForCausalLM,
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    ),
    **{f"llama, {name}": (transformers.LlamaForCausalLM, settings) for name, settings in SCALED.items()},
    "gemma": (
        transformers.GemmaForCausalLM,
        {
            "head_dim": 12,
            "hidden_act": "gelu",
            "hidden_activation": None,  # as released
            "attention_bias": True,
            "tie_word_embeddings": False,
            "pad_token_id": None,
        },
    ),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 4,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": False,
            "pad_token_id": None,
        },
    ),
    "gemma3, blocks of two kinds": (
        transformers.Gemma3ForCausalLM,
        {
            "head_dim": 12,
            "attention_bias": True,
            "query_pre_attn_scalar": 20,
            "sliding_window": 4,
            "sliding_window_pattern": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 2.5},
            "tie_word_embeddings": False,  # a tied random head says what it was last told
            "bos_token_id": None,
            "pad_token_id": None,
        },
    ),
    "gemma3, only local blocks": (
        transformers.Gemma3ForCausalLM,
        {
            "head_dim": 12,
            "sliding_window": 4,
            "layer_types": ["sliding_attention"] * 3,
            "tie_word_embeddings": False,
            "pad_token_id": None,
        },
    ),
    "gemma4, blocks of two kinds": (
        transformers.Gemma4ForCausalLM,
        {
            "num_hidden_layers": 4,
            "head_dim": 12,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "attention_bias": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.4,
                    "factor": 2.0,
                    "rope_theta": 500.0,
                },
                "sliding_attention": {"rope_type": "linear", "factor": 2.5, "rope_theta": 50.0},
            },
            "final_logit_softcapping": 2.0,
            "hidden_size_per_layer_input": 0,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "pad_token_id": None,
        },
    ),
    "gemma4, values of their own": (
        transformers.Gemma4ForCausalLM,
        {
            "head_dim": 12,
            "global_head_dim": 8,
            "sliding_window": 4,
            "hidden_size_per_layer_input": 0,
            "pad_token_id": None,
            "tie_word_embeddings": False,
        },
    ),
    "gemma4, shared keys and inputs of every block": (
        transformers.Gemma4ForCausalLM,
        {
            "num_hidden_layers": 7,
            "head_dim": 12,
            "global_head_dim": 8,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "attention_bias": True,
            "sliding_window": 4,
            "layer_types": [*["sliding_attention", "full_attention", "sliding_attention"] * 2, "full_attention"],
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 5,
            "vocab_size_per_layer_input": 101,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "pad_token_id": None,
        },
    ),
    "mistral": (transformers.MistralForCausalLM, {"sliding_window": 4}),
    "qwen2": (transformers.Qwen2ForCausalLM, {}),
    "qwen2, upper layers with windows": (
        transformers.Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "qwen2, a layer with a window": (
        transformers.Qwen2ForCausalLM,
        {
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "qwen3": (transformers.Qwen3ForCausalLM, {"head_dim": 12}),
    "qwen3_5": (transformers.Qwen3_5ForCausalLM, QWEN3_5),
    "qwen3_5, three layers of two kinds": (
        transformers.Qwen3_5ForCausalLM,
        {
            **QWEN3_5,
            "num_hidden_layers": 3,
            "attention_bias": True,
            "layer_types": ["full_attention", "full_attention", "linear_attention"],
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_5 with experts": (
        transformers.Qwen3_5MoeForCausalLM,
        {**QWEN3_5, **EXPERTS, "shared_expert_intermediate_size": 20},
    ),
    "qwen3 with experts": (transformers.Qwen3MoeForCausalLM, {"head_dim": 12, "norm_topk_prob": True, **EXPERTS}),
    "qwen3 with experts, weights as scored": (transformers.Qwen3MoeForCausalLM, EXPERTS),
}


def randomised(model):
    """The model with random parameters, biases and scales among them; what it says does not go in circles."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.3 if "norm" in name else 0.5)
    return model.eval()


def made(name):
    cls, settings = MODELS[name]
    return randomised(cls(cls.config_class(**{**SIZES, **settings})))


def their_logits(model, ids, **inputs):
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long), **inputs).logits.numpy()


def check(ours, theirs):
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * np.abs(theirs).max()


VISION = {"depth": 1, "embed_dim": 8, "num_heads": 1, "hidden_size": 32, "in_channels": 3}


VISION_2_5 = {"depth": 1, "hidden_size": 8, "num_heads": 1, "out_hidden_size": 32, "intermediate_size": 8}


SYSTEMS = {
    "qwen2_vl": (transformers.Qwen2VLForConditionalGeneration, VISION),
    "qwen2_5_vl": (transformers.Qwen2_5_VLForConditionalGeneration, VISION_2_5),
}


def made_system(kind, scaling):
    cls, vision = SYSTEMS[kind]
    section = {**SIZES, "rope_parameters": {"mrope_section": [1, 1, 2], "rope_theta": 1000.0, **scaling}}
    return randomised(cls(cls.config_class(text_config=section, vision_config=vision)))


def loaded_text(model, folder):
    """Our language model of a system of transformers, and the tensors that it was read from."""
    tensors = {key.replace("language_model.", ""): tensor for key, tensor in model.state_dict().items()}
    tensors = {key: tensor.numpy() for key, tensor in tensors.items() if "visual" not in key}
    save_checkpoint(folder, tensors)
    return vlm_jax.from_pretrained(folder, config=model.config.text_config.to_dict()), tensors


NEW = 32


LENGTHS = (5, 9, 12)  # within and beyond the positions of training of the scaled rotary settings


def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(0, SIZES["vocab_size"], size=length) for length in LENGTHS]


def batch_of(rows, side):
    """Prompts as one batch, padded on one side with what is of no account."""
    length = max(map(len, rows))

    def padded(row, values, fill):
        missing = length - len(row)
        return np.pad(values, (missing, 0) if side == "left" else (0, missing), constant_values=fill)

    def column(values, fill):
        return np.stack([padded(row, values(row), fill) for row in rows]).astype(np.int32)

    return Batch(
        tokens=column(lambda row: row, 7),
        positions=column(lambda row: np.arange(len(row)), 3),
        segment_ids=column(np.ones_like, 0),
        visual_index=column(lambda row: -np.ones_like(row), -1),
    )


def theirs(model, row):
    model.generation_config.eos_token_id = None
    ids = torch.tensor(row[None])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(ids))
    return out[0, len(row) :].tolist()

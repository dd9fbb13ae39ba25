"""DeepSeek-V2's and DeepSeek-VL2's language models, in the format of their releases."""

import re
from collections.abc import Mapping

from vlm_jax.checkpoints.maps import deepseek as maps
from vlm_jax.checkpoints.maps.torch_layers import rms_norm
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.decoders.deepseek import Deepseek
from vlm_jax.pretrained.family import (
    ACTIVATIONS,
    LanguageModel,
    Names,
    PretrainedError,
    check_supported,
    with_defaults,
)
from vlm_jax.pretrained.hugging_face import expert_width, text_sizes, vocabulary
from vlm_jax.pretrained.rope import ROPE_DEFAULTS, released_logit_scale, released_rope
from vlm_jax.types import Config, Dtype, Fields

# deepseek_vl2/models/configuration_deepseek.py: that of DeepSeek-V2 with `use_mla`.
DEFAULTS: Fields = {
    "vocab_size": 102_400,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "n_shared_experts": None,
    "n_routed_experts": None,
    "num_experts_per_tok": None,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 0,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "n_group": None,
    "topk_group": None,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "use_mla": True,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    **ROPE_DEFAULTS,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


def deepseek_v2(
    config: Config,
    checkpoint: Mapping[str, SourceTensor],
    where: str,
    *,
    names: Names,
    **dtypes: Dtype,
) -> LanguageModel:
    """DeepSeek-V2 and its variants in DeepSeek-VL2: with latent or multi-head attention.

    Raises:
      PretrainedError: unsupported settings.
    """
    settings = with_defaults(config, DEFAULTS, where)
    plain = not settings["use_mla"]
    known = {
        "hidden_act": tuple(ACTIVATIONS),
        "mlp_bias": (False,),
        "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
        "scoring_func": ("softmax", "sigmoid"),
        **({"attention_bias": (False,)} if plain else {}),
    }
    check_supported(settings, known, where)
    tied = settings["tie_word_embeddings"]
    # With latent attention, all heads share one rotary key.
    shared = {"num_key_value_heads": None, "head_dim": settings["qk_rope_head_dim"]}
    *_, rope_dim = text_sizes({**settings, **({"head_dim": None} if plain else shared)}, where)
    decoder = Deepseek(
        vocab_size=settings["vocab_size"],
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        mlp_dim=settings["intermediate_size"],
        activation=ACTIVATIONS[settings["hidden_act"]],
        rope=released_rope(settings, where, rope_dim),
        norm_epsilon=settings["rms_norm_eps"],
        tie_embeddings=tied,
        **_attention_fields(settings, where),
        **_expert_fields(settings, where),
        **dtypes,
    )
    stored = f"{names.trunk}embed_tokens.weight", f"{names.head}lm_head.weight"
    rules = (
        *prefixed(trunk_rules(decoder), names.trunk),
        *vocabulary(*stored, checkpoint, where, tied=tied),
    )
    return LanguageModel(decoder, rules, (rf"{re.escape(names.trunk)}layers\.\d+\.self_attn\.rotary_emb\.inv_freq",))


def trunk_rules(decoder: Deepseek) -> tuple[Rule, ...]:
    """Blocks and final norm, after `model.`."""
    rules = [*rms_norm("norm", "final_norm")]
    for name, layers in decoder.stacks():
        target, where = f"{name}/layers", {"layer": layers}
        rules += maps.block_rules(target, where)
        if decoder.latent_dim is None:
            rules += maps.plain_attention_rules(target, where)
        else:
            rules += maps.latent_attention_rules(
                target,
                where,
                num_heads=decoder.num_heads,
                latent_dim=decoder.latent_dim,
                content_dim=decoder.content_dim,
                rope_dim=decoder.rope_dim,
                value_dim=decoder.value_dim,
                query_latent=decoder.query_latent_dim is not None,
                bias=decoder.attention_bias,
            )
        if name.startswith("sparse"):
            has_bias = decoder.selection == "noaux_tc"
            rules += maps.experts_rules(target, where, shared=decoder.num_shared > 0, bias=has_bias)
        else:
            rules += maps.dense_rules(target, where)
    return tuple(rules)


def _attention_fields(settings: Config, where: str) -> Fields:
    if not settings["use_mla"]:
        return {"latent_dim": None, "num_kv_heads": settings["num_key_value_heads"]}
    return {
        "logit_scale": released_logit_scale(settings, where),
        "latent_dim": settings["kv_lora_rank"],
        "query_latent_dim": settings["q_lora_rank"],
        "content_dim": settings["qk_nope_head_dim"],
        "rope_dim": settings["qk_rope_head_dim"],
        "value_dim": settings["v_head_dim"],
        "attention_bias": settings["attention_bias"],
    }


def _expert_fields(settings: Config, where: str) -> Fields:
    """Fields of the mixtures of experts; without routed experts every layer is dense."""
    fields = {"expert_dim": expert_width(settings, where), "num_experts": 1, "num_selected": 1}
    if settings["n_routed_experts"] is None:
        return {**fields, "num_dense": settings["num_hidden_layers"]}
    if settings["num_experts_per_tok"] is None:
        raise PretrainedError(f"{where}.num_experts_per_tok: expected the number of experts per token, got None")
    if settings["topk_method"] != "greedy":  # for which releases set groups, but do not use them
        fields |= {"num_groups": settings["n_group"] or 1, "num_selected_groups": settings["topk_group"] or 1}
    return {
        **fields,
        "num_experts": settings["n_routed_experts"],
        "num_selected": settings["num_experts_per_tok"],
        "num_shared": settings["n_shared_experts"] or 0,
        "num_dense": settings["first_k_dense_replace"],
        "expert_every": settings["moe_layer_freq"],
        "scoring": settings["scoring_func"],
        "selection": settings["topk_method"],
        "normalize_weights": settings["norm_topk_prob"],
        "weight_scale": float(settings["routed_scaling_factor"]),
        "balance_weight": float(settings["aux_loss_alpha"]),
        "balance_over": "sequence" if settings["seq_aux"] else "batch",
    }

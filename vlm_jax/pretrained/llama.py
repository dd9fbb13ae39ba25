"""Language models of the Llama family: Llama, Mistral, Qwen2, Qwen3 with or without experts, and those of Qwen-VLs."""

import re
from collections.abc import Mapping
from typing import Any

from vlm_jax.checkpoints.maps.transformer import Experts, trunk_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.decoders.transformer import Transformer
from vlm_jax.pretrained.family import (
    ACTIVATIONS,
    LanguageModel,
    Names,
    PretrainedError,
    check_supported,
    with_defaults,
)
from vlm_jax.pretrained.hugging_face import expert_width, text_sizes, vocabulary
from vlm_jax.pretrained.rope import ROPE_DEFAULTS, released_rope
from vlm_jax.types import Config, Dtype, Fields

# The settings of each class, with defaults: transformers, models/llama/configuration_llama.py, and those of the
# others. Other keys of a config are ignored, as in transformers.
_COMMON: Fields = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    **ROPE_DEFAULTS,
}
# Of a class without these settings: only its own biases; a window, if any, applies to every layer.
_UNREAD: Fields = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": True,
    "sliding_window": None,
    "max_window_layers": 0,
    "layer_types": None,
}
LLAMA_DEFAULTS: Fields = {**_COMMON, "attention_bias": False, "mlp_bias": False}
MISTRAL_DEFAULTS: Fields = {
    **_COMMON,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
QWEN2_DEFAULTS: Fields = {
    **_COMMON,
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
QWEN3_DEFAULTS: Fields = {**QWEN2_DEFAULTS, "head_dim": 128, "attention_bias": False}
# transformers, models/qwen3_moe/configuration_qwen3_moe.py; windows are of all layers or of none.
QWEN3_MOE_DEFAULTS: Fields = {
    **_COMMON,
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_local_experts": None,  # the same in files of later versions
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}
# EvolvingLMMs-Lab/LLaVA-OneVision-1.5, configuration_llavaonevision1_5.py, LLaVAOneVision1_5_TextConfig.
LLAVA_ONEVISION_15_DEFAULTS: Fields = {
    **QWEN3_DEFAULTS,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "max_position_embeddings": 262_144,
    "rope_theta": 5_000_000.0,
    "sliding_window": None,
    "max_window_layers": 36,
}
QWEN2_VL_DEFAULTS: Fields = {
    **QWEN2_DEFAULTS,
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "rope_theta": 1_000_000.0,
}
QWEN2_VL_SECTIONS = (16, 24, 24)
# transformers, models/qwen2_5_omni/configuration_qwen2_5_omni.py, Qwen2_5OmniTextConfig.
QWEN2_5_OMNI_DEFAULTS: Fields = {
    **QWEN2_VL_DEFAULTS,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "sliding_window": 32_768,
    "max_window_layers": 28,
    "tie_word_embeddings": True,
}
# transformers, models/qwen3_vl/configuration_qwen3_vl.py, Qwen3VLTextConfig.
QWEN3_VL_DEFAULTS: Fields = {
    **_COMMON,
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "attention_bias": False,
    "max_position_embeddings": 128_000,
    "rope_theta": 500_000.0,
}
QWEN3_VL_SECTIONS = (24, 20, 20)
# The same of models/qwen3_vl_moe, Qwen3VLMoeTextConfig.
QWEN3_VL_MOE_DEFAULTS: Fields = {
    **QWEN3_VL_DEFAULTS,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": None,
    "tie_word_embeddings": True,
    "moe_intermediate_size": 1408,
    "num_experts": 60,
    "num_local_experts": None,  # the same in files of later versions
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}


def llama(
    config: Config,
    checkpoint: Mapping[str, SourceTensor],
    where: str,
    *,
    names: Names,
    defaults: Config = LLAMA_DEFAULTS,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    sections: tuple[int, ...] = (),
    interleaved: bool = False,
    separate: bool = False,
    **dtypes: Dtype,
) -> LanguageModel:
    """Llama; and, with other settings, Qwen2 (biases on query, key and value) and Qwen3 (normalised heads).

    Raises:
      PretrainedError: unsupported settings, or a tied head that differs from the table.
    """
    read = {key: value for key, value in config.items() if key in defaults}
    settings = {**_UNREAD, **with_defaults(read, defaults, where)}
    switches = {"attention_bias": (True, False), "mlp_bias": (True, False)}
    check_supported(settings, {"hidden_act": tuple(ACTIVATIONS), **switches}, where)
    tied, (heads, kv_heads, head_dim) = settings["tie_word_embeddings"], text_sizes(settings, where)
    biases = {
        "qkv_bias": qkv_bias or settings["attention_bias"],
        "out_bias": settings["attention_bias"],
        "mlp_bias": settings["mlp_bias"],
    }
    experts: Fields = {}
    if "moe_intermediate_size" in settings:
        check_supported(settings, {"decoder_sparse_step": (1,), "mlp_only_layers": (None, [])}, where)
        experts = {
            "expert_dim": expert_width(settings, where),
            "num_experts": settings["num_local_experts"] or settings["num_experts"],
            "num_selected": settings["num_experts_per_tok"],
            "normalize_weights": settings.get("norm_topk_prob", True),
        }
    decoder = Transformer(
        vocab_size=settings["vocab_size"],
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=settings["intermediate_size"],
        activation=ACTIVATIONS[settings["hidden_act"]],
        head_dim=settings["head_dim"],
        rope=released_rope(settings, where, head_dim, sections, interleaved=interleaved),
        norm_epsilon=settings["rms_norm_eps"],
        qk_norm=qk_norm,
        windows=_windows(settings, where),
        tie_embeddings=tied,
        **biases,
        **experts,
        **dtypes,
    )
    trunk = trunk_rules(
        **biases,
        qk_norm=qk_norm,
        expert_dim=decoder.expert_dim,
        experts=_stored_experts(checkpoint.get(f"{names.trunk}layers.0.mlp.experts.gate_up_proj"), decoder, separate),
    )
    rules = (
        *prefixed(trunk, names.trunk),
        *vocabulary(f"{names.trunk}embed_tokens.weight", f"{names.head}lm_head.weight", checkpoint, where, tied=tied),
    )
    return LanguageModel(decoder, rules, (rf"{re.escape(names.trunk)}(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",))


def mistral(config: Config, checkpoint: Mapping[str, SourceTensor], where: str, **more: Any) -> LanguageModel:
    """Mistral."""
    return llama(config, checkpoint, where, defaults=MISTRAL_DEFAULTS, **more)


def qwen2(config: Config, checkpoint: Mapping[str, SourceTensor], where: str, **more: Any) -> LanguageModel:
    """Qwen2 and Qwen2.5."""
    return llama(config, checkpoint, where, defaults=QWEN2_DEFAULTS, qkv_bias=True, **more)


def qwen3(config: Config, checkpoint: Mapping[str, SourceTensor], where: str, **more: Any) -> LanguageModel:
    """Qwen3."""
    return llama(config, checkpoint, where, defaults=QWEN3_DEFAULTS, qk_norm=True, **more)


def qwen3_moe(config: Config, checkpoint: Mapping[str, SourceTensor], where: str, **more: Any) -> LanguageModel:
    """Qwen3 with experts in every layer; the released files have tensors of each expert."""
    return llama(config, checkpoint, where, defaults=QWEN3_MOE_DEFAULTS, qk_norm=True, separate=True, **more)


def llava_onevision15(config: Config, checkpoint: Mapping[str, SourceTensor], where: str, **more: Any) -> LanguageModel:
    """The language model of LLaVA-OneVision 1.5: Qwen3, whose visual tokens have positions on one axis as text has.

    M-RoPE sections of a config are ignored, as in the release.
    """
    scaling = config.get("rope_scaling") or {}
    if "mrope_section" in scaling:
        plain = {key: value for key, value in scaling.items() if key != "mrope_section"}
        config = {**config, "rope_scaling": plain}
    return llama(config, checkpoint, where, defaults=LLAVA_ONEVISION_15_DEFAULTS, qk_norm=True, **more)


def qwen2_vl(config: Config, checkpoint: Mapping[str, SourceTensor], where: str, **more: Any) -> LanguageModel:
    """The language models of Qwen2-VL and Qwen2.5-VL: Qwen2 with M-RoPE.

    The config is the text section, or the full config, which may contain the text settings at the top level.
    """
    if "text_config" in config:
        text = config["text_config"]
        tied = any(section.get("tie_word_embeddings", False) for section in (config, text))
        config, where = {**text, "tie_word_embeddings": tied}, f"{where}.text_config"
    return llama(
        config, checkpoint, where, defaults=QWEN2_VL_DEFAULTS, qkv_bias=True, sections=QWEN2_VL_SECTIONS, **more
    )


def qwen2_5_omni(config: Config, checkpoint: Mapping[str, SourceTensor], where: str, **more: Any) -> LanguageModel:
    """The language model of Qwen2.5-Omni's thinker: Qwen2 with M-RoPE."""
    own: Fields = {"defaults": QWEN2_5_OMNI_DEFAULTS, "sections": QWEN2_VL_SECTIONS}
    return llama(config, checkpoint, where, qkv_bias=True, **own, **more)


def qwen3_vl(config: Config, checkpoint: Mapping[str, SourceTensor], where: str, **more: Any) -> LanguageModel:
    """The language model of Qwen3-VL: Qwen3 with interleaved M-RoPE; dense, or with experts in every layer."""
    sparse = config["model_type"] == "qwen3_vl_moe_text"
    settings: Fields = {"defaults": QWEN3_VL_MOE_DEFAULTS if sparse else QWEN3_VL_DEFAULTS, "interleaved": True}
    return llama(config, checkpoint, where, qk_norm=True, sections=QWEN3_VL_SECTIONS, **settings, **more)


def _stored_experts(stacked: SourceTensor | None, decoder: Transformer, separate: bool) -> Experts:
    """How experts are stored: in [out, in] by files that transformers wrote, not by those of the release."""
    if stacked is None:
        return "separate" if separate else "stacked"
    out_first = decoder.expert_dim is not None and stacked.shape[1] == 2 * decoder.expert_dim
    return "stacked_out_first" if out_first else "stacked"


def _windows(settings: Config, where: str) -> tuple[int | None, ...]:
    """The window of every layer; empty where none has one."""
    depth, window = settings["num_hidden_layers"], settings["sliding_window"]
    if not settings["use_sliding_window"] or window is None:
        return ()
    kinds = settings["layer_types"]
    if kinds is None:
        kinds = ["full_attention" if i < settings["max_window_layers"] else "sliding_attention" for i in range(depth)]
    known = {f"layer_types[{i}]": ("full_attention", "sliding_attention") for i in range(depth)}
    check_supported({f"layer_types[{i}]": kind for i, kind in enumerate(kinds)}, known, where)
    if len(kinds) != depth:
        raise PretrainedError(f"{where}.layer_types: expected {depth}, one per layer, got {len(kinds)}")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()

"""Released language models: the decoder of a text config, its rules, and text-only checkpoints."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.maps.transformer import trunk_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.config import did_you_mean
from vlm_jax.decoders.transformer import Transformer
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained.deepseek import deepseek_v2
from vlm_jax.pretrained.family import (
    REQUIRED,
    Description,
    Family,
    LanguageModel,
    Names,
    PretrainedError,
    check_supported,
    with_defaults,
)
from vlm_jax.pretrained.hugging_face import vocabulary
from vlm_jax.pretrained.rope import ROPE_DEFAULTS, released_rope
from vlm_jax.types import Batch

# transformers, models/llama/configuration_llama.py, and those of qwen2 and qwen3.
LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    **ROPE_DEFAULTS,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
QWEN2_DEFAULTS: dict[str, Any] = {
    **LLAMA_DEFAULTS,
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
}
QWEN3_DEFAULTS: dict[str, Any] = {**QWEN2_DEFAULTS, "head_dim": 128}


def llama(
    config: Mapping[str, Any],
    checkpoint: Mapping[str, SourceTensor],
    where: str,
    *,
    names: Names,
    defaults: Mapping[str, Any] = LLAMA_DEFAULTS,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    **dtypes: Any,
) -> LanguageModel:
    """Llama; and, with other settings, Qwen2 (biases on query, key and value) and Qwen3 (normalised heads).

    Raises:
      PretrainedError: settings that nothing here computes, or a head that is tied and yet not the table.
    """
    settings = with_defaults(config, defaults, where)
    known = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_sliding_window": (False,),
    }
    check_supported(settings, known, where)
    tied = settings["tie_word_embeddings"]
    heads = settings["num_attention_heads"]
    decoder = Transformer(
        vocab_size=settings["vocab_size"],
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=settings["num_key_value_heads"] or heads,
        mlp_dim=settings["intermediate_size"],
        head_dim=settings["head_dim"],
        rope=released_rope(settings, where),
        norm_epsilon=settings["rms_norm_eps"],
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tie_embeddings=tied,
        **dtypes,
    )
    rules = (
        *prefixed(trunk_rules(qkv_bias=qkv_bias, qk_norm=qk_norm), names.trunk),
        *vocabulary(f"{names.trunk}embed_tokens.weight", f"{names.head}lm_head.weight", checkpoint, where, tied=tied),
    )
    return LanguageModel(decoder, rules, (rf"{re.escape(names.trunk)}(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",))


def qwen2(config: Mapping[str, Any], checkpoint: Mapping[str, SourceTensor], where: str, **more: Any) -> LanguageModel:
    """Qwen2 and Qwen2.5."""
    return llama(config, checkpoint, where, defaults=QWEN2_DEFAULTS, qkv_bias=True, **more)


def qwen3(config: Mapping[str, Any], checkpoint: Mapping[str, SourceTensor], where: str, **more: Any) -> LanguageModel:
    """Qwen3."""
    return llama(config, checkpoint, where, defaults=QWEN3_DEFAULTS, qk_norm=True, **more)


# What a released config calls its language model -> who describes it, with the arguments of `language_model`.
LANGUAGE_MODELS: dict[str, Callable[..., LanguageModel]] = {
    "deepseek_v2": deepseek_v2,
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def language_model(
    config: Mapping[str, Any],
    checkpoint: Mapping[str, SourceTensor],
    where: str,
    *,
    names: Names = Names(),  # noqa: B008 (immutable)
    dtype: Any,
    param_dtype: Any,
) -> LanguageModel:
    """The language model of a released text config.

    Args:
      config: the section, with its `model_type`.
      checkpoint: tells whether a tied head is stored.
      where: names the section in messages.
      names: what stands before the released keys.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Raises:
      PretrainedError: no such language model, or settings that nothing here computes.
    """
    kind = with_defaults(config, {"model_type": REQUIRED}, where)["model_type"]
    if kind not in LANGUAGE_MODELS:
        raise PretrainedError(
            f"{where}.model_type: no language model '{kind}' here{did_you_mean(kind, LANGUAGE_MODELS)}"
        )
    return LANGUAGE_MODELS[kind](config, checkpoint, where, names=names, dtype=dtype, param_dtype=param_dtype)


def alone(describe: Callable[..., LanguageModel]) -> Family:
    """The family of the text-only checkpoints of a language model: a `VLM` that is a decoder alone."""

    def family(
        config: Mapping[str, Any], checkpoint: Mapping[str, SourceTensor], *, dtype: Any, param_dtype: Any
    ) -> Description:
        where = config["model_type"]
        found = describe(config, checkpoint, where, names=Names(), dtype=dtype, param_dtype=param_dtype)
        row = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        rules = prefixed(found.rules, target="decoder/")
        return Description(VLM(None, None, found.decoder), (Batch(row, row, row, row),), rules, found.ignore)

    return family


FAMILIES: dict[str, Family] = {kind: alone(describe) for kind, describe in LANGUAGE_MODELS.items()}

"""The language model of Qwen and Qwen-VL (v1), under its own names."""

import re
from collections.abc import Mapping

from vlm_jax.checkpoints.maps.transformer import qwen_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.decoders.transformer import Transformer
from vlm_jax.layers.rope import Rope
from vlm_jax.pretrained.family import REQUIRED, LanguageModel, Names, check_supported, with_defaults
from vlm_jax.pretrained.hugging_face import vocabulary
from vlm_jax.types import Config, Dtype, Fields

# Qwen/Qwen-VL-Chat, configuration_qwen.py.
DEFAULTS: Fields = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10_000.0,
    "rotary_pct": 1.0,
    "seq_length": REQUIRED,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "scale_attn_weights": True,
    "no_bias": True,
    "tie_word_embeddings": False,
}


def qwen(
    config: Config, checkpoint: Mapping[str, SourceTensor], where: str, *, names: Names, **dtypes: Dtype
) -> LanguageModel:
    """Llama with biases on query, key and value; beyond `seq_length` with scaled queries and rotary angles.

    The angles depend on the length of the prompt, also in training, where the release does not scale them.

    Raises:
      PretrainedError: unsupported settings.
    """
    settings = with_defaults(config, DEFAULTS, where)
    known = {"rotary_pct": (1.0,), "scale_attn_weights": (True,), "no_bias": (True,)}
    check_supported(settings, known, where)
    tied, theta, length = settings["tie_word_embeddings"], float(settings["rotary_emb_base"]), settings["seq_length"]
    heads, head_dim = settings["num_attention_heads"], settings["kv_channels"]
    stretched = Rope(theta, "dynamic_prompt", original_length=length)
    decoder = Transformer(
        vocab_size=settings["vocab_size"],
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        mlp_dim=settings["intermediate_size"] // 2,  # of both halves together
        head_dim=head_dim,
        rope=stretched if settings["use_dynamic_ntk"] else Rope(theta),
        log_length=length if settings["use_logn_attn"] else None,
        norm_epsilon=settings["layer_norm_epsilon"],
        qkv_bias=True,
        tie_embeddings=tied,
        **dtypes,
    )
    rules = (
        *prefixed(qwen_rules(heads * head_dim), names.trunk),
        *vocabulary(f"{names.trunk}wte.weight", f"{names.head}lm_head.weight", checkpoint, where, tied=tied),
    )
    return LanguageModel(decoder, rules, (rf"{re.escape(names.trunk)}rotary_emb\.inv_freq",))

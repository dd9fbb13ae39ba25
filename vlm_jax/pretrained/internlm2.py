"""InternLM2, whose query, key and value are one weight."""

import re
from collections.abc import Mapping

from vlm_jax.checkpoints.maps.transformer import internlm2_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.decoders.transformer import Transformer
from vlm_jax.pretrained.family import ACTIVATIONS, LanguageModel, Names, check_supported, with_defaults
from vlm_jax.pretrained.hugging_face import text_sizes, vocabulary
from vlm_jax.pretrained.rope import ROPE_DEFAULTS, released_rope
from vlm_jax.types import Config, Dtype, Fields

# OpenGVLab/InternVL, internvl_chat/internvl/model/internlm2/configuration_internlm2.py.
DEFAULTS: Fields = {
    "vocab_size": 103_168,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bias": True,
    "tie_word_embeddings": False,
    **ROPE_DEFAULTS,
}


def internlm2(
    config: Config, checkpoint: Mapping[str, SourceTensor], where: str, *, names: Names, **dtypes: Dtype
) -> LanguageModel:
    """Llama with InternLM2's names; its fused query-key-value weight is split at load.

    Raises:
      PretrainedError: unsupported settings.
    """
    settings = with_defaults(config, DEFAULTS, where)
    check_supported(settings, {"hidden_act": tuple(ACTIVATIONS), "bias": (False,)}, where)
    tied, width = settings["tie_word_embeddings"], settings["hidden_size"]
    heads, kv_heads, head_dim = text_sizes({**settings, "head_dim": None}, where)
    decoder = Transformer(
        vocab_size=settings["vocab_size"],
        width=width,
        depth=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=settings["intermediate_size"],
        activation=ACTIVATIONS[settings["hidden_act"]],
        rope=released_rope(settings, where, head_dim),
        norm_epsilon=settings["rms_norm_eps"],
        tie_embeddings=tied,
        **dtypes,
    )
    rules = (
        *prefixed(internlm2_rules(width=width, num_heads=heads, num_kv_heads=kv_heads), names.trunk),
        *vocabulary(f"{names.trunk}tok_embeddings.weight", f"{names.head}output.weight", checkpoint, where, tied=tied),
    )
    return LanguageModel(decoder, rules, (rf"{re.escape(names.trunk)}layers\.\d+\.attention\.rotary_emb\.inv_freq",))

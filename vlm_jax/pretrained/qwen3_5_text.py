"""The language models of Qwen3.5, dense and with experts, whose layers are of two kinds."""

import re
from collections.abc import Mapping
from typing import Literal

from vlm_jax.checkpoints.maps import qwen3_5 as maps
from vlm_jax.checkpoints.maps.torch_layers import rms_norm
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.decoders.hybrid import Hybrid
from vlm_jax.pretrained.family import (
    ACTIVATIONS,
    LanguageModel,
    Names,
    PretrainedError,
    check_supported,
    with_defaults,
)
from vlm_jax.pretrained.hugging_face import text_sizes, vocabulary
from vlm_jax.pretrained.rope import ROPE_DEFAULTS, released_rope
from vlm_jax.types import Config, Dtype, Fields

# transformers, models/qwen3_5/configuration_qwen3_5.py, Qwen3_5TextConfig.
DEFAULTS: Fields = {
    "vocab_size": 248_320,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "layer_types": None,
    "full_attention_interval": 4,
    **ROPE_DEFAULTS,
    "partial_rotary_factor": 0.25,
}
# The same of models/qwen3_5_moe, Qwen3_5MoeTextConfig.
MOE_DEFAULTS: Fields = {
    **{key: value for key, value in DEFAULTS.items() if key != "intermediate_size"},
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
}
SECTIONS = (11, 11, 10)
_MIXERS: dict[str, Literal["attention", "delta"]] = {"full_attention": "attention", "linear_attention": "delta"}


def qwen3_5_text(
    config: Config,
    checkpoint: Mapping[str, SourceTensor],
    where: str,
    *,
    names: Names,
    defaults: Config = DEFAULTS,
    **dtypes: Dtype,
) -> LanguageModel:
    """The language model of Qwen3.5; layers that predict several tokens (`mtp`) are not read, as in transformers.

    Raises:
      PretrainedError: unsupported settings, or a tied head that differs from the table.
    """
    read = {key: value for key, value in config.items() if key in defaults}
    settings = with_defaults(read, defaults, where)
    check_supported(settings, {"hidden_act": tuple(ACTIVATIONS), "attention_bias": (True, False)}, where)
    tied, (heads, kv_heads, head_dim) = settings["tie_word_embeddings"], text_sizes(settings, where)
    sizes = _positive(settings, {**_DELTA, **(_EXPERTS if "num_experts" in settings else _DENSE)}, where)
    if "num_experts" in settings and settings["num_experts_per_tok"] > settings["num_experts"]:
        raise PretrainedError(
            f"{where}.num_experts_per_tok: expected at most num_experts, {settings['num_experts']}, got "
            f"{settings['num_experts_per_tok']}"
        )
    keys, values = settings["linear_num_key_heads"], settings["linear_num_value_heads"]
    if values % keys:
        raise PretrainedError(
            f"{where}.linear_num_key_heads: expected a divisor of linear_num_value_heads, {values}, got {keys}"
        )
    rope_settings, rotary = _rotary(settings, head_dim, where)
    bias = settings["attention_bias"]
    decoder = Hybrid(
        vocab_size=settings["vocab_size"],
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        mixers=_mixers(settings, where),
        activation=ACTIVATIONS[settings["hidden_act"]],
        head_dim=head_dim,
        rotary_width=rotary,
        rope=released_rope(rope_settings, where, rotary, SECTIONS, interleaved=True),
        norm_epsilon=settings["rms_norm_eps"],
        qkv_bias=bias,
        out_bias=bias,
        tie_embeddings=tied,
        **sizes,
        **dtypes,
    )
    separate = f"{names.trunk}layers.0.mlp.experts.0.down_proj.weight" in checkpoint
    rules = (
        *prefixed(_trunk_rules(decoder, head_dim, separate), names.trunk),
        *vocabulary(f"{names.trunk}embed_tokens.weight", f"{names.head}lm_head.weight", checkpoint, where, tied=tied),
    )
    return LanguageModel(decoder, rules, (r"mtp\..*", rf"{re.escape(names.trunk)}rotary_emb\..*inv_freq"))


def qwen3_5_moe_text(
    config: Config, checkpoint: Mapping[str, SourceTensor], where: str, *, names: Names, **dtypes: Dtype
) -> LanguageModel:
    """The same with experts in every layer, and one that all tokens share."""
    return qwen3_5_text(config, checkpoint, where, names=names, defaults=MOE_DEFAULTS, **dtypes)


# Field of `Hybrid` -> key of a config.
_DELTA = {
    "num_key_heads": "linear_num_key_heads",
    "num_value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "window": "linear_conv_kernel_dim",
}
_DENSE = {"mlp_dim": "intermediate_size"}
_EXPERTS = {
    "mlp_dim": "shared_expert_intermediate_size",
    "expert_dim": "moe_intermediate_size",
    "num_experts": "num_experts",
    "num_selected": "num_experts_per_tok",
}


def _positive(settings: Config, names: Mapping[str, str], where: str) -> dict[str, int]:
    """Field -> size; a PretrainedError names all keys whose sizes are not positive integers."""
    wrong = {key: settings[key] for key in names.values() if type(settings[key]) is not int or settings[key] < 1}
    if wrong:
        messages = (f"{where}.{key}: expected a positive integer, got {size!r}" for key, size in wrong.items())
        raise PretrainedError("\n".join(messages))
    return {field: settings[key] for field, key in names.items()}


def _mixers(settings: Config, where: str) -> tuple[Literal["attention", "delta"], ...]:
    """The kind of every layer."""
    depth, kinds = settings["num_hidden_layers"], settings["layer_types"]
    if kinds is None:
        every = settings["full_attention_interval"]
        if type(every) is not int or every < 1:
            raise PretrainedError(f"{where}.full_attention_interval: expected a positive integer, got {every!r}")
        kinds = ["linear_attention" if (number + 1) % every else "full_attention" for number in range(depth)]
    listed = {f"layer_types[{number}]": kind for number, kind in enumerate(kinds)}
    check_supported(listed, dict.fromkeys(listed, tuple(_MIXERS)), where)
    if len(kinds) != depth:
        raise PretrainedError(f"{where}.layer_types: expected {depth}, one per layer, got {len(kinds)}")
    return tuple(_MIXERS[kind] for kind in kinds)


def _rotary(settings: Config, head_dim: int, where: str) -> tuple[Fields, int]:
    """The rotary settings without the share of a head that is rotated, and the number of its rotated coordinates."""
    key = "rope_scaling" if settings["rope_scaling"] else "rope_parameters"
    found, share, place = settings[key] or {}, settings["partial_rotary_factor"], where
    if isinstance(found, Mapping) and "partial_rotary_factor" in found:
        share, place = found["partial_rotary_factor"], f"{where}.{key}"
        found = {name: value for name, value in found.items() if name != "partial_rotary_factor"}
    dim = int(head_dim * share) if isinstance(share, int | float) and 0 < share <= 1 else 0
    if dim < 2 or dim % 2:
        raise PretrainedError(
            f"{place}.partial_rotary_factor: expected a share of 1 that is an even number of the {head_dim} "
            f"coordinates of a head, got {share!r}"
        )
    return {**settings, key: found, "partial_rotary_factor": None}, dim


def _trunk_rules(decoder: Hybrid, head_dim: int, separate: bool) -> tuple[Rule, ...]:
    """Blocks and final norm, after `model.`; `separate` as in `block_rules`."""
    rules = [*rms_norm("norm", "final_norm")]
    for name, layers in decoder.stacks():
        target, where = f"{name}/layers", {"layer": layers}
        rules += maps.block_rules(target, where, decoder.expert_dim, separate=separate)
        if name.startswith("delta"):
            widths = {
                "keys": decoder.num_key_heads * decoder.key_dim,
                "values": decoder.num_value_heads * decoder.value_dim,
                "window": decoder.window,
            }
            rules += maps.delta_rules(target, where, **widths)
        else:
            rules += maps.attention_rules(
                target,
                where,
                width=decoder.width,
                num_heads=decoder.num_heads,
                head_dim=head_dim,
                bias=decoder.qkv_bias,
            )
    return tuple(rules)

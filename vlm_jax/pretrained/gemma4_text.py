"""The language model of Gemma 4: blocks that are local, with a window, or global, with wider heads.

In the small sizes (E2B, E4B) blocks have inputs of their own, and the last ones read earlier blocks' keys and values.
"""

import dataclasses
import re
from collections.abc import Mapping

from vlm_jax.checkpoints.maps.gemma4 import block_rules, expert_rules, input_rules
from vlm_jax.checkpoints.maps.torch_layers import rms_norm
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.decoders.mixed import BlockKind, MixedTransformer
from vlm_jax.layers.rope import Rope
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

# transformers, models/gemma4/configuration_gemma4.py, Gemma4TextConfig.
TEXT_DEFAULTS: Fields = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": None,
    "attention_bias": False,
    "sliding_window": 512,
    "layer_types": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": None,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "pad_token_id": 0,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "per_layer_config": None,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
_ROPES: Fields = {
    LOCAL: {"rope_type": "default", "rope_theta": 10_000.0},
    GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def gemma4(
    config: Config, checkpoint: Mapping[str, SourceTensor], where: str, *, names: Names, **dtypes: Dtype
) -> LanguageModel:
    """The language model of Gemma 4.

    Raises:
      PretrainedError: unsupported parts or settings, or a tied head that differs from the table.
    """
    read = {key: value for key, value in config.items() if key in TEXT_DEFAULTS}
    if "per_layer_config" in read:  # null, as in transformers, is not the default: layers are alike
        read["per_layer_config"] = read["per_layer_config"] or {}
    settings = with_defaults(read, TEXT_DEFAULTS, where)
    switches = {"hidden_activation": tuple(ACTIVATIONS), "attention_bias": (True, False)}
    check_supported(settings, {**switches, "use_bidirectional_attention": (None, "vision")}, where)
    heads, *_ = text_sizes(settings, where)
    kinds, order = _kinds(settings, where)
    tied, bias = settings["tie_word_embeddings"], settings["attention_bias"]
    decoder = MixedTransformer(
        vocab_size=settings["vocab_size"],
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        num_heads=heads,
        mlp_dim=settings["intermediate_size"],
        kinds=kinds,
        order=order,
        activation=ACTIVATIONS[settings["hidden_activation"]],
        norm_epsilon=settings["rms_norm_eps"],
        use_bias=bias,
        embedding_scale=settings["hidden_size"] ** 0.5,
        logit_softcap=settings["final_logit_softcapping"],
        tie_embeddings=tied,
        **_own_inputs(settings, where),
        **_experts(settings, where),
        **dtypes,
    )
    rules = [*rms_norm("norm", "final_norm"), *(input_rules() if decoder.own_input_dim is not None else ())]
    for name, layers in decoder.stacks():
        kind = kinds[order[layers[0]]]
        own = {"key": kind.shares_with is None, "value": not kind.value_is_key}
        inputs = decoder.own_input_dim is not None
        rules += block_rules(f"{name}/layers", layers, **own, bias=bias, own_input=inputs)
        if decoder.expert_dim is not None:
            rules += expert_rules(f"{name}/layers", layers, decoder.expert_dim)
    table, head = f"{names.trunk}embed_tokens.weight", f"{names.head}lm_head.weight"
    whole = (*prefixed(rules, names.trunk), *vocabulary(table, head, checkpoint, where, tied=tied))
    shared = [str(number) for number, index in enumerate(order) if kinds[index].shares_with is not None]
    unread = rf"{re.escape(names.trunk)}layers\.({'|'.join(shared)})\.self_attn\.[kv]_(proj|norm)\..*"
    return LanguageModel(decoder, whole, (unread,) if shared else ())


def _own_inputs(settings: Config, where: str) -> Fields:
    """Fields of the inputs of every block's own, if there are any."""
    if not settings["hidden_size_per_layer_input"]:
        return {}
    rows, ids = settings["vocab_size_per_layer_input"], settings["vocab_size"]
    if rows < ids:
        raise PretrainedError(
            f"{where}.vocab_size_per_layer_input: expected a row for each of {ids} ids of vocab_size, got {rows}"
        )
    pad = settings["pad_token_id"] or 0
    if not 0 <= pad < rows:
        raise PretrainedError(f"{where}.pad_token_id: expected the row of visual tokens, 0 to {rows - 1}, got {pad}")
    return {
        "own_input_dim": settings["hidden_size_per_layer_input"],
        "own_input_rows": rows,
        "placeholder": pad,
    }


def _experts(settings: Config, where: str) -> Fields:
    """Fields of the experts beside the feed-forwards, if there are any."""
    if not settings["enable_moe_block"]:
        return {}
    names = {"moe_intermediate_size": "expert_dim", "num_experts": "num_experts", "top_k_experts": "num_selected"}
    missing = [key for key in names if settings[key] is None]
    if missing:
        raise PretrainedError(f"{where}: enable_moe_block needs the keys {', '.join(missing)}, got null")
    if settings["top_k_experts"] > settings["num_experts"]:
        raise PretrainedError(
            f"{where}.top_k_experts: expected at most num_experts, {settings['num_experts']}, got "
            f"{settings['top_k_experts']}"
        )
    return {ours: settings[key] for key, ours in names.items()}


def _kinds(settings: Config, where: str) -> tuple[tuple[BlockKind, ...], tuple[int, ...]]:
    """The kinds of blocks, and of each block the index of its kind; the last block is global, as in transformers."""
    depth, types = settings["num_hidden_layers"], settings["layer_types"]
    if types is None:
        types = [LOCAL if (number + 1) % 6 else GLOBAL for number in range(depth)]
    known = {f"layer_types[{number}]": (LOCAL, GLOBAL) for number in range(len(types))}
    check_supported({f"layer_types[{number}]": kind for number, kind in enumerate(types)}, known, where)
    if len(types) != depth:
        raise PretrainedError(f"{where}.layer_types: expected {depth}, one per layer, got {len(types)}")
    types = [*types[:-1], GLOBAL]
    if LOCAL in types and not settings["sliding_window"]:
        raise PretrainedError(
            f"{where}.sliding_window: layers of {LOCAL} need a positive number, got {settings['sliding_window']!r}"
        )
    made = [_kind(settings, types[number], own, where) for number, own in enumerate(_own_heads(settings, types, where))]
    kinds = tuple(dict.fromkeys(made[: depth - settings["num_kv_shared_layers"]]))
    shared = _sharing(settings, types, made, kinds, where)
    whole = [*made[: depth - len(shared)], *shared]
    kinds = tuple(dict.fromkeys(whole))
    return kinds, tuple(map(kinds.index, whole))


def _sharing(
    settings: Config, types: list[str], made: list[BlockKind], kinds: tuple[BlockKind, ...], where: str
) -> list[BlockKind]:
    """The kinds of the last layers, which read keys and values of the last earlier layer of their type.

    Args:
      settings: the released section.
      types: of all layers.
      made: their kinds, without sharing.
      kinds: the different ones of the layers with keys and values of their own.
      where: name of the section for errors.
    """
    first = len(types) - settings["num_kv_shared_layers"]
    sources = {kind: number for number, kind in enumerate(types[: max(first, 0)])}
    missing = sorted(set(types[max(first, 0) :]) - set(sources))
    if missing:
        raise PretrainedError(
            f"{where}.num_kv_shared_layers: expected earlier layers of {' and '.join(missing)} with keys and values "
            f"of their own, of {len(types)} layers, got {settings['num_kv_shared_layers']}"
        )
    found = []
    for number in range(first, len(types)):
        own, source = made[number], made[sources[types[number]]]
        if own.head_dim != source.head_dim:
            raise PretrainedError(
                f"{where}.per_layer_config.{number}.head_dim: expected {source.head_dim}, as layer "
                f"{sources[types[number]]}, whose keys this layer reads, got {own.head_dim}"
            )
        wide = 2 * settings["intermediate_size"] if settings["use_double_wide_mlp"] else None
        found.append(dataclasses.replace(source, rope=own.rope, mlp_dim=wide, shares_with=kinds.index(source)))
    return found


def _own_heads(settings: Config, types: list[str], where: str) -> list[Fields]:
    """Of every layer `head_dim` and `num_key_value_heads`."""
    whole = {key: settings[key] for key in ("head_dim", "num_key_value_heads")}
    given = settings["per_layer_config"]
    if given is None:
        of_global = {**whole, "head_dim": settings["global_head_dim"]}
        if settings["attention_k_eq_v"] and settings["num_global_key_value_heads"] is not None:
            of_global["num_key_value_heads"] = settings["num_global_key_value_heads"]
        return [of_global if kind == GLOBAL else whole for kind in types]
    found, place = [dict(whole) for _ in types], f"{where}.per_layer_config"
    for key, own in given.items():
        number = int(key) if str(key).isdecimal() else -1
        if not 0 <= number < len(types):
            raise PretrainedError(f"{place}: expected numbers of layers from 0 to {len(types) - 1}, got {key!r}")
        if not isinstance(own, Mapping) or set(own) - set(whole):
            raise PretrainedError(f"{place}.{key}: expected an object with {' and '.join(whole)}, got {own!r}")
        found[number] |= own
    return found


def _kind(settings: Config, kind: str, own: Config, where: str) -> BlockKind:
    """The kind of a layer from its type and its own heads."""
    _, kv_heads, head_dim = text_sizes({**settings, **own}, where)
    is_global = kind == GLOBAL
    return BlockKind(
        head_dim,
        kv_heads,
        _rope(settings, kind, head_dim, where),
        None if is_global else settings["sliding_window"],
        value_is_key=settings["attention_k_eq_v"] and is_global,
        reads_groups=not is_global,
    )


def _rope(settings: Config, kind: str, head_dim: int, where: str) -> Rope:
    """The rotary settings of a type of layers."""
    given = settings["rope_parameters"] or _ROPES
    own = given.get(kind) if isinstance(given, Mapping) else None
    if not isinstance(own, Mapping):
        raise PretrainedError(f"{where}.rope_parameters: expected a set of settings for {kind}, got {given!r}")
    if own.get("rope_type") != "proportional":
        old = {**ROPE_DEFAULTS, "max_position_embeddings": settings["max_position_embeddings"]}
        return released_rope({**old, "rope_parameters": own}, f"{where}.{kind}", head_dim)
    numbers = {"rope_theta": 10_000.0, "factor": 1.0, "partial_rotary_factor": 1.0, **own}
    try:
        theta, factor, share = (float(numbers[key]) for key in ("rope_theta", "factor", "partial_rotary_factor"))
    except (TypeError, ValueError) as error:
        raise PretrainedError(f"{where}.rope_parameters.{kind}: expected numbers, got {own!r}") from error
    return Rope(theta, "proportional", factor, rotated_share=share)

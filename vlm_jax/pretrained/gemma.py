"""Language models of the Gemma family: Gemma, Gemma 2 and Gemma 3. Gemma 2 and 3 have local and global blocks."""

import re
from collections.abc import Mapping

from vlm_jax.checkpoints.maps.transformer import trunk_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.decoders.transformer import Transformer
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

# transformers, models/gemma/configuration_gemma.py, GemmaConfig.
GEMMA_DEFAULTS: Fields = {
    "vocab_size": 256_000,
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_bidirectional_attention": None,
    **ROPE_DEFAULTS,
}
# transformers, models/gemma2/configuration_gemma2.py, Gemma2Config.
GEMMA2_DEFAULTS: Fields = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": None,
    **ROPE_DEFAULTS,
}
# transformers, models/gemma3/configuration_gemma3.py, Gemma3TextConfig.
GEMMA3_DEFAULTS: Fields = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "layer_types": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    **ROPE_DEFAULTS,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
_CAUSAL: dict[str, tuple[object, ...]] = {"use_bidirectional_attention": (False, None)}


def gemma(
    config: Config, checkpoint: Mapping[str, SourceTensor], where: str, *, names: Names, **dtypes: Dtype
) -> LanguageModel:
    """Gemma.

    Its activation `gelu` is the tanh approximation too, as in transformers, which ignores `hidden_activation`.

    Raises:
      PretrainedError: unsupported settings, or a tied head that differs from the table.
    """
    read = {key: value for key, value in config.items() if key in GEMMA_DEFAULTS}
    settings = with_defaults(read, GEMMA_DEFAULTS, where)
    check_supported(settings, {"hidden_act": tuple(ACTIVATIONS), **_CAUSAL}, where)
    activation = "gelu_pytorch_tanh" if settings["hidden_act"] == "gelu" else settings["hidden_act"]
    return _one_rope(settings, {"activation": ACTIVATIONS[activation]}, checkpoint, where, names, dtypes)


def gemma2(
    config: Config, checkpoint: Mapping[str, SourceTensor], where: str, *, names: Names, **dtypes: Dtype
) -> LanguageModel:
    """Gemma 2; by default every other layer is local, the first one included.

    Raises:
      PretrainedError: unsupported settings, or a tied head that differs from the table.
    """
    read = {key: value for key, value in config.items() if key in GEMMA2_DEFAULTS and key != "sliding_window_pattern"}
    settings = with_defaults(read, GEMMA2_DEFAULTS, where)
    check_supported(settings, {"hidden_activation": tuple(ACTIVATIONS), **_CAUSAL}, where)
    fields: Fields = {
        "activation": ACTIVATIONS[settings["hidden_activation"]],
        "post_norm": True,
        "qk_scale": settings["query_pre_attn_scalar"] ** -0.5,
        "groups_exceed_windows": True,  # of PaliGemma 2
        "attention_softcap": settings["attn_logit_softcapping"],
        "logit_softcap": settings["final_logit_softcapping"],
        "windows": _windows(settings, where),
    }
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if settings[key] is not None and settings[key] <= 0:
            raise PretrainedError(f"{where}.{key}: expected a positive number or null, got {settings[key]!r}")
    return _one_rope(settings, fields, checkpoint, where, names, dtypes)


def _one_rope(
    settings: Config,
    fields: Fields,
    checkpoint: Mapping[str, SourceTensor],
    where: str,
    names: Names,
    dtypes: Mapping[str, Dtype],
) -> LanguageModel:
    """What Gemma and Gemma 2 share; `fields`: more fields of the decoder."""
    check_supported(settings, {"attention_bias": (True, False)}, where)
    tied, (heads, kv_heads, head_dim) = settings["tie_word_embeddings"], text_sizes(settings, where)
    biases = {"qkv_bias": settings["attention_bias"], "out_bias": settings["attention_bias"], "mlp_bias": False}
    decoder = Transformer(
        vocab_size=settings["vocab_size"],
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=settings["intermediate_size"],
        head_dim=head_dim,
        rope=released_rope(settings, where, head_dim),
        norm="rms_from_one",
        norm_epsilon=settings["rms_norm_eps"],
        embedding_scale=settings["hidden_size"] ** 0.5,
        tie_embeddings=tied,
        **biases,
        **fields,
        **dtypes,
    )
    rules = (
        *prefixed(trunk_rules(**biases, qk_norm=False, post_norm=decoder.post_norm), names.trunk),
        *vocabulary(f"{names.trunk}embed_tokens.weight", f"{names.head}lm_head.weight", checkpoint, where, tied=tied),
    )
    return LanguageModel(decoder, rules, (rf"{re.escape(names.trunk)}(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",))


def gemma3(
    config: Config, checkpoint: Mapping[str, SourceTensor], where: str, *, names: Names, **dtypes: Dtype
) -> LanguageModel:
    """Gemma 3.

    `attn_logit_softcapping` is ignored, as in transformers.

    Raises:
      PretrainedError: unsupported settings, or a tied head that differs from the table.
    """
    read = {key: value for key, value in config.items() if key in GEMMA3_DEFAULTS}
    settings = with_defaults(read, GEMMA3_DEFAULTS, where)
    unread = {"final_logit_softcapping": (None,), "use_bidirectional_attention": (False, None)}
    switches = {"hidden_activation": tuple(ACTIVATIONS), "attention_bias": (True, False)}
    check_supported(settings, {**switches, **unread}, where)
    tied, (heads, kv_heads, head_dim) = settings["tie_word_embeddings"], text_sizes(settings, where)
    windows = _windows(settings, where)
    ropes = {kind: _rope(settings, kind, head_dim, where) for kind in (GLOBAL, LOCAL)}
    whole, local = ropes[GLOBAL], ropes[LOCAL] if any(windows) else None
    if windows and None not in windows:  # no block has the global one
        whole, local = ropes[LOCAL], None
    if local is not None and local.magnitude != whole.magnitude:
        raise PretrainedError(
            f"{where}.rope_parameters: expected one attention factor of both kinds of layers, got {whole.magnitude} "
            f"({GLOBAL}) and {local.magnitude} ({LOCAL})"
        )
    biases = {"qkv_bias": settings["attention_bias"], "out_bias": settings["attention_bias"], "mlp_bias": False}
    decoder = Transformer(
        vocab_size=settings["vocab_size"],
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=settings["intermediate_size"],
        activation=ACTIVATIONS[settings["hidden_activation"]],
        head_dim=head_dim,
        rope=whole,
        local_rope=None if local == whole else local,
        norm="rms_from_one",
        norm_epsilon=settings["rms_norm_eps"],
        post_norm=True,
        qk_norm=True,
        qk_scale=settings["query_pre_attn_scalar"] ** -0.5,
        embedding_scale=settings["hidden_size"] ** 0.5,
        windows=windows,
        tie_embeddings=tied,
        **biases,
        **dtypes,
    )
    rules = (
        *prefixed(trunk_rules(**biases, qk_norm=True, post_norm=True), names.trunk),
        *vocabulary(f"{names.trunk}embed_tokens.weight", f"{names.head}lm_head.weight", checkpoint, where, tied=tied),
    )
    return LanguageModel(decoder, rules, (rf"{re.escape(names.trunk)}rotary_emb(_local)?\..*inv_freq",))


def _windows(settings: Config, where: str) -> tuple[int | None, ...]:
    """The window of every layer; empty where none has one."""
    depth, window, kinds = (settings[key] for key in ("num_hidden_layers", "sliding_window", "layer_types"))
    if kinds is None:
        pattern = settings["sliding_window_pattern"]
        kinds = [LOCAL if (number + 1) % pattern else GLOBAL for number in range(depth)]
    known = {f"layer_types[{number}]": (LOCAL, GLOBAL) for number in range(len(kinds))}
    check_supported({f"layer_types[{number}]": kind for number, kind in enumerate(kinds)}, known, where)
    if len(kinds) != depth:
        raise PretrainedError(f"{where}.layer_types: expected {depth}, one per layer, got {len(kinds)}")
    if LOCAL in kinds and not window:
        raise PretrainedError(f"{where}.sliding_window: layers of {LOCAL} need a positive number, got {window!r}")
    return tuple(window if kind == LOCAL else None for kind in kinds) if LOCAL in kinds else ()


def _rope(settings: Config, kind: str, head_dim: int, where: str) -> Rope:
    """The rotary settings of a kind of layers: of `rope_parameters` by its name, or of the keys of older files."""
    given = settings["rope_parameters"] or {}
    if not isinstance(given, Mapping) or any(not isinstance(one, Mapping | None) for one in given.values()):
        raise PretrainedError(
            f"{where}.rope_parameters: expected a set of settings for {GLOBAL} and for {LOCAL}, got {given!r}"
        )
    theta = settings["rope_theta" if kind == GLOBAL else "rope_local_base_freq"]
    scaling = (settings["rope_scaling"] or {}) if kind == GLOBAL else {}
    if not isinstance(scaling, Mapping):
        raise PretrainedError(f"{where}.rope_scaling: expected a set of settings or null, got {scaling!r}")
    own = {**(given.get(kind) or {}), **scaling}
    return released_rope(
        {**settings, "rope_theta": theta, "rope_scaling": None, "rope_parameters": own}, f"{where}.{kind}", head_dim
    )

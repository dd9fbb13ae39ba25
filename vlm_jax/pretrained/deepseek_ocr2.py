"""DeepSeek-OCR 2: SAM, learned queries behind it, a linear projector and the language model.

`describe` reads a config of transformers, `describe_release` one of the release. The tensors have the release's names
in both, since transformers writes these.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.maps.deepseek_ocr import DOWNSAMPLES, sam_rules
from vlm_jax.checkpoints.maps.deepseek_ocr2 import BLOCKS, QUERIES, queries_rules
from vlm_jax.checkpoints.maps.torch_layers import linear
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.encoders.causal_queries import CausalQueries
from vlm_jax.encoders.sam import SAM
from vlm_jax.layers.rope import Rope
from vlm_jax.pretrained.composition import visual_half, with_language
from vlm_jax.pretrained.deepseek_ocr import (
    LANGUAGE,
    MLP_RATIO,
    NECK_DIM,
    NECK_KEY,
    PATCH_SIZE,
    PROJECTOR_DEFAULTS,
    SAM_DEFAULTS,
    SAM_NAME,
    WINDOW_SIZE,
)
from vlm_jax.pretrained.family import (
    ACTIVATIONS,
    REQUIRED,
    Description,
    Names,
    PretrainedError,
    check_supported,
    with_defaults,
)
from vlm_jax.pretrained.hugging_face import text_sizes
from vlm_jax.pretrained.rope import ROPE_DEFAULTS, released_rope
from vlm_jax.pretrained.sam import stacks, vision_encoder
from vlm_jax.released_json import shown
from vlm_jax.types import Config, Dtype, Fields

WHERE, RELEASE = "deepseek_ocr2", "DeepseekOCR2"
SAM_KEYS, QUERY_KEYS = "model.sam_model.", "model.qwen2_model."
LEARNED_ROWS = {"view_separator": "model.view_seperator"}
NUM_QUERIES = (144, 256)  # rows of the released tables, of 12 x 12 and 16 x 16 features

# transformers, models/deepseek_ocr2/configuration_deepseek_ocr2.py.
DOWNSAMPLE_DIMS = (512, 896)
ENCODER_DEFAULTS: Fields = {
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    **ROPE_DEFAULTS,
}
TEXT_DEFAULTS: Fields = {
    "vocab_size": 102_400,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": None,
    "moe_intermediate_size": 1407,
    "topk_method": "greedy",
    "mlp_layer_types": REQUIRED,
}
# What a config of transformers states in other words, or not at all: it has no loss that balances experts, and its
# router always takes the softmax as it is.
TEXT_FIXED: Fields = {
    "model_type": "deepseek_v2",
    "use_mla": False,
    "moe_layer_freq": 1,
    "aux_loss_alpha": 0.0,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
}

# deepencoderv2.py, build_qwen2_decoder_as_encoder and CustomQwen2Decoder: sizes that the release's config does not
# have. What differs in the tensors is read from their shapes.
QUERIES_NAME = "qwen2-0-5b"
VISION_DEFAULTS: Fields = {"image_size": 1024, "model_name": "deepencoderv2", "width": REQUIRED}
QUERIES_DEFAULTS: Fields = {"dim": 896}
DEPTH, HEAD_DIM, NUM_KV_HEADS, MLP_DIM, ROPE_THETA, EPSILON = 24, 64, 2, 4864, 1e6, 1e-6


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `DeepseekOcr2ForConditionalGeneration` of transformers."""
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    settings = with_defaults(config, {"vision_config": {}, "text_config": {}, "tie_word_embeddings": False}, WHERE)
    where = f"{WHERE}.vision_config"
    vision = with_defaults(settings["vision_config"], {"sam_config": {}, "encoder_config": {}}, where)
    channels = _two_channels(vision["sam_config"].get("downsample_channels"), f"{where}.sam_config.downsample_channels")
    first = vision_encoder(vision["sam_config"], f"{where}.sam_config", downsample_dims=channels, **dtypes)
    encoder = _queries(vision["encoder_config"], first, checkpoint, f"{where}.encoder_config", dtypes)
    text = _text(settings["text_config"], f"{WHERE}.text_config")
    text["tie_word_embeddings"] = settings["tie_word_embeddings"]
    return _described(encoder, text, text["hidden_size"], checkpoint, f"{WHERE}.text_config", dtypes)


def describe_release(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `DeepseekOCR2ForCausalLM`, whose settings of the language model are in the config itself."""
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    settings = with_defaults(config, {"vision_config": REQUIRED, "projector_config": {}, "tile_tag": "2D"}, RELEASE)
    check_supported(settings, {"tile_tag": ("2D",)}, RELEASE)
    where = f"{RELEASE}.vision_config"
    vision = with_defaults(settings["vision_config"], VISION_DEFAULTS, where)
    check_supported(vision, {"model_name": ("deepencoderv2",)}, where)
    if not isinstance(vision["width"], Mapping) or None in vision["width"].values():
        raise PretrainedError(
            f"{where}.width: expected an object with the sizes of {SAM_NAME} and {QUERIES_NAME}, got "
            f"{shown(vision['width'])}"
        )
    sizes = with_defaults(vision["width"].get(QUERIES_NAME, {}), QUERIES_DEFAULTS, f"{where}.width.{QUERIES_NAME}")
    width = sizes["dim"]
    if width % HEAD_DIM:
        raise PretrainedError(
            f"{where}.width.{QUERIES_NAME}.dim: expected a multiple of {HEAD_DIM}, the width of a head, got {width}"
        )
    blocks = f"{QUERY_KEYS}{BLOCKS}layers."
    numbers = (re.fullmatch(rf"{re.escape(blocks)}(\d+)\.input_layernorm\.weight", key) for key in checkpoint)
    encoder = CausalQueries(
        first=_released_sam(vision, width, checkpoint, where, dtypes),
        table_sizes=_table_sizes(checkpoint),
        depth=max((1 + int(number[1]) for number in numbers if number), default=DEPTH),
        num_heads=width // HEAD_DIM,
        num_kv_heads=_rows(checkpoint, f"{blocks}0.self_attn.k_proj.weight", NUM_KV_HEADS * HEAD_DIM) // HEAD_DIM,
        mlp_dim=_rows(checkpoint, f"{blocks}0.mlp.gate_proj.weight", MLP_DIM),
        rope=Rope(ROPE_THETA),
        norm_epsilon=EPSILON,
        **dtypes,
    )
    _check_width(encoder, width, f"{where}.width.{QUERIES_NAME}.dim")
    defaults = {**PROJECTOR_DEFAULTS, "input_dim": QUERIES_DEFAULTS["dim"]}
    section = with_defaults(settings["projector_config"], defaults, f"{RELEASE}.projector_config")
    supported = {"projector_type": ("linear",), "input_dim": (width,)}
    check_supported(section, supported, f"{RELEASE}.projector_config")
    text = {**config.get("language_config", {}), **config, "model_type": "deepseek_v2"}
    return _described(encoder, text, section["n_embed"], checkpoint, RELEASE, dtypes)


def _described(
    encoder: CausalQueries,
    text: Config,
    features: int,
    checkpoint: Mapping[str, SourceTensor],
    where: str,
    dtypes: Fields,
) -> Description:
    first = encoder.first
    assert isinstance(first, SAM)
    grid = first.patch_grid(*first.image_size)
    of_sam = sam_rules(
        grid=grid, width=first.width, neck_dim=first.neck_dim, runs=stacks(first), qkv_bias=first.qkv_bias
    )
    rules = (
        *prefixed(of_sam, SAM_KEYS, "encoder/first/"),
        *prefixed(queries_rules(), QUERY_KEYS, "encoder/"),
        *prefixed(linear("model.projector.layers", "mlp/down"), target="connector/"),
    )
    pixels = jax.ShapeDtypeStruct((1, *first.image_size, 3), jnp.float32)
    has_language = any(key.startswith("model.embed_tokens.") for key in checkpoint)
    connector = MlpConnector(features, depth=1, **dtypes)
    visual = visual_half(encoder, connector, pixels, rules, () if has_language else tuple(LEARNED_ROWS.values()))
    return with_language(
        visual,
        text,
        checkpoint,
        where,
        names=Names("model.", ""),
        beside=LANGUAGE,
        learned_rows=LEARNED_ROWS,
        **dtypes,
    )


def _queries(
    section: Config, first: SAM, checkpoint: Mapping[str, SourceTensor], where: str, dtypes: Fields
) -> CausalQueries:
    """The encoder of a config of transformers."""
    settings = with_defaults(section, ENCODER_DEFAULTS, where)
    check_supported(settings, {"hidden_act": tuple(ACTIVATIONS), "use_sliding_window": (False,)}, where)
    heads, kv_heads, head_dim = text_sizes({**settings, "vocab_size": 1, "head_dim": None}, where)
    encoder = CausalQueries(
        first=first,
        table_sizes=_table_sizes(checkpoint),
        depth=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=settings["intermediate_size"],
        activation=ACTIVATIONS[settings["hidden_act"]],
        rope=released_rope(settings, where, head_dim),
        norm_epsilon=settings["rms_norm_eps"],
        **dtypes,
    )
    if encoder.rope.by_length:
        raise PretrainedError(
            f"{where}: expected rotary positions that do not depend on the length, got {encoder.rope.scaling}"
        )
    _check_width(encoder, settings["hidden_size"], f"{where}.hidden_size")
    return encoder


def _text(section: Config, where: str) -> Fields:
    """The language model's settings in the words of the release."""
    settings = with_defaults(section, TEXT_DEFAULTS, where)
    kinds, depth = list(settings["mlp_layer_types"]), settings["num_hidden_layers"]
    dense = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if kinds != ["dense"] * dense + ["sparse"] * (depth - dense):
        raise PretrainedError(
            f"{where}.mlp_layer_types: expected {depth} kinds of layers, those of 'dense' before those of 'sparse', "
            f"got {shown(kinds)}"
        )
    return {**settings, **TEXT_FIXED, "head_dim": None, "first_k_dense_replace": dense}


def _released_sam(
    vision: Config, width: int, checkpoint: Mapping[str, SourceTensor], where: str, dtypes: Fields
) -> SAM:
    """The release's SAM; its `downsample_channels` have no effect, since the code has its own."""
    sizes = with_defaults(vision["width"].get(SAM_NAME, {}), SAM_DEFAULTS, f"{where}.width.{SAM_NAME}")
    convolutions = zip(DOWNSAMPLES, (DOWNSAMPLE_DIMS[0], width), strict=True)
    return SAM(
        image_size=(vision["image_size"],) * 2,
        patch_size=PATCH_SIZE,
        width=sizes["width"],
        depth=sizes["layers"],
        num_heads=sizes["heads"],
        mlp_dim=MLP_RATIO * sizes["width"],
        neck_dim=_rows(checkpoint, NECK_KEY, NECK_DIM),
        global_blocks=tuple(sizes["global_attn_indexes"]),
        window_size=WINDOW_SIZE,
        downsample_dims=tuple(_rows(checkpoint, f"{SAM_KEYS}{name}.weight", dim) for name, dim in convolutions),
        **dtypes,
    )


def _table_sizes(checkpoint: Mapping[str, SourceTensor]) -> tuple[int, ...]:
    """Rows of the tables of queries, which no config has."""
    keys = (f"{QUERY_KEYS}{name}.weight" for name in QUERIES)
    found = tuple(_rows(checkpoint, key, rows) for key, rows in zip(keys, NUM_QUERIES, strict=True))
    if found[0] >= found[1]:
        raise PretrainedError(f"{QUERY_KEYS}{QUERIES[1]}.weight: expected more than {found[0]} rows, got {found[1]}")
    return found


def _rows(checkpoint: Mapping[str, SourceTensor], key: str, default: int) -> int:
    """The length of the first axis of a tensor."""
    found = checkpoint.get(key)
    return default if found is None else found.shape[0]


def _two_channels(channels: object, where: str) -> tuple[int, ...]:
    if channels is None:
        return DOWNSAMPLE_DIMS
    if not isinstance(channels, list | tuple) or len(channels) != len(DOWNSAMPLES):
        raise PretrainedError(f"{where}: expected {len(DOWNSAMPLES)} numbers, got {shown(channels)}")
    return tuple(channels)


def _check_width(encoder: CausalQueries, width: int, where: str) -> None:
    if encoder.features != width:
        raise PretrainedError(
            f"{where}: expected {encoder.features}, the channels of the last convolution behind SAM, got {width}"
        )

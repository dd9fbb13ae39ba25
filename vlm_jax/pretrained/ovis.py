"""Ovis 2 (official files and transformers) and Ovis 2.5: tower, visual vocabulary, language model."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.maps import aimv2, siglip2_navit
from vlm_jax.checkpoints.maps.ovis import vocabulary_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.connectors.visual_vocabulary import VisualVocabulary
from vlm_jax.encoders.aimv2 import AIMv2
from vlm_jax.encoders.siglip2_navit import Siglip2NaViT
from vlm_jax.pretrained.composition import text_names, text_section, visual_half, with_language
from vlm_jax.pretrained.family import REQUIRED, Description, Names, check_supported, find_prefix, with_defaults
from vlm_jax.pretrained.qwen2_vl import packed_shapes
from vlm_jax.types import Config, Dtype, Fields

# AIDC-AI/Ovis2, modeling_aimv2.py, AIMv2Config; sizes differ between releases and must be given.
AIMV2_DEFAULTS: Fields = {
    "hidden_size": REQUIRED,
    "intermediate_size": REQUIRED,
    "num_hidden_layers": REQUIRED,
    "num_attention_heads": REQUIRED,
    "num_channels": 3,
    "image_size": REQUIRED,
    "patch_size": 14,
    "rms_norm_eps": 1e-5,
    "qkv_bias": False,
    "use_bias": False,
}
# AIDC-AI/Ovis2, configuration_ovis.py, BaseVisualTokenizerConfig.
TOKENIZER_DEFAULTS: Fields = {
    "backbone_config": REQUIRED,
    "vocab_size": 16384,
    "tokenize_function": "softmax",
    "tau": 1.0,
    "hidden_stride": 1,
    "drop_cls_token": False,
}
NUM_INDICATORS, NUM_INDICATORS_2_5 = 5, 4  # constants of the released code
# transformers, models/ovis2/configuration_ovis2.py, Ovis2VisionConfig.
OVIS2_HF_DEFAULTS: Fields = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "rms_norm_eps": 1e-5,
    "qkv_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "hidden_stride": 1,
    "vocab_size": 16384,
    "num_visual_indicator_tokens": 5,
    "tokenize_function": "softmax",
}
# AIDC-AI/Ovis2.5-9B, configuration_ovis2_5.py, Siglip2NavitConfig.
NAVIT_DEFAULTS: Fields = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_patches": -1,
    "image_size": 512,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "hidden_stride": 2,
    "window_size": 112,
    "fullatt_block_indexes": None,
    "temporal_patch_size": 1,
    "preserve_original_pe": True,
    "use_rope": True,
}


BESIDE = (r"llm\..*",)
_LLM = Names("llm.model.", "llm.")
# The port's behaviour for each name: it ignores tau, and differentiates its argmax as a softmax.
HF_TOKENIZE = {"softmax": "softmax", "gumbel_argmax": "gumbel_argmax", "st_argmax": "hard_softmax"}
_VOCABULARY = vocabulary_rules("visual_tokenizer.head.0", "visual_tokenizer.head.1", "vte")


def describe_ovis2(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """Ovis 2 in the format of its release."""
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    required = {"hidden_size": REQUIRED, "visual_tokenizer_config": REQUIRED, "llm_config": {}}
    whole = with_defaults(config, required, "ovis")
    where = "ovis.visual_tokenizer_config"
    tokenizer = with_defaults(whole["visual_tokenizer_config"], TOKENIZER_DEFAULTS, where)
    known = {"tokenize_function": ("softmax", "gumbel_argmax", "st_argmax"), "drop_cls_token": (False,)}
    check_supported(tokenizer, known, where)
    settings = with_defaults(tokenizer["backbone_config"], AIMV2_DEFAULTS, f"{where}.backbone_config")
    check_supported(settings, {"model_type": ("aimv2",)}, f"{where}.backbone_config")
    encoder = AIMv2(qkv_bias=settings["qkv_bias"], use_bias=settings["use_bias"], **_aimv2_fields(settings), **dtypes)
    connector = VisualVocabulary(
        features=whole["hidden_size"],
        vocab_size=tokenizer["vocab_size"],
        factor=tokenizer["hidden_stride"],
        num_indicators=NUM_INDICATORS,
        tokenize=tokenizer["tokenize_function"],
        tau=tokenizer["tau"],
        **dtypes,
    )
    tower = aimv2.encoder_rules(
        width=encoder.width,
        num_patches=(settings["image_size"] // settings["patch_size"]) ** 2,
        qkv_bias=encoder.qkv_bias,
        use_bias=encoder.use_bias,
    )
    rules = (
        *prefixed(tower, "visual_tokenizer.backbone.", "encoder/"),
        *prefixed(_VOCABULARY, target="connector/"),
    )
    ignore = (r"visual_tokenizer\.backbone\.trunk\.post_trunk_norm\.weight",)
    visual = visual_half(encoder, connector, _pixels(encoder, settings), rules, ignore)
    return _with_llm(visual, {"model_type": "qwen2", **whole["llm_config"]}, checkpoint, "ovis.llm_config", dtypes)


def describe_ovis2_hf(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """Ovis 2 in the format of transformers, which normalises features before they are merged."""
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    whole = with_defaults(config, {"hidden_size": 1536, "vision_config": REQUIRED}, "ovis2")
    settings = with_defaults(whole["vision_config"], OVIS2_HF_DEFAULTS, "ovis2.vision_config")
    expected = {
        "hidden_act": ("silu",),
        "mlp_bias": (settings["qkv_bias"],),
        "tokenize_function": tuple(HF_TOKENIZE),
    }
    check_supported(settings, expected, "ovis2.vision_config")
    encoder = AIMv2(
        qkv_bias=settings["qkv_bias"],
        use_bias=settings["mlp_bias"],
        final_norm=True,
        **_aimv2_fields(settings),
        **dtypes,
    )
    connector = VisualVocabulary(
        features=whole["hidden_size"],
        vocab_size=settings["vocab_size"],
        factor=settings["hidden_stride"],
        num_indicators=settings["num_visual_indicator_tokens"],
        tokenize=HF_TOKENIZE[settings["tokenize_function"]],  # type: ignore[arg-type]
        **dtypes,
    )
    prefix = find_prefix(checkpoint, "vision_tower.head_linear.weight")
    tower = f"{prefix}vision_tower."
    vocabulary = vocabulary_rules(f"{tower}head_linear", f"{tower}head_norm", f"{prefix}visual_embeddings_table")
    rules = (
        *prefixed(aimv2.hf_encoder_rules(bias=settings["mlp_bias"]), f"{tower}transformer.", "encoder/"),
        *prefixed(vocabulary, target="connector/"),
    )
    return with_language(
        visual_half(encoder, connector, _pixels(encoder, settings), rules),
        text_section(config, checkpoint, kind="qwen2", tied=True),
        checkpoint,
        "ovis2.text_config",
        names=text_names(checkpoint),
        beside=(r"(model\.)?language_model\..*", r"lm_head\..*"),
        learned_rows="connector",
        **dtypes,
    )


def describe_ovis2_5(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """Ovis 2.5."""
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    required = {"hidden_size": REQUIRED, "visual_vocab_size": 65536, "vit_config": REQUIRED, "llm_config": {}}
    whole = with_defaults(config, required, "ovis2_5")
    encoder = navit(whole["vit_config"], "ovis2_5.vit_config", **dtypes)
    connector = VisualVocabulary(
        features=whole["hidden_size"],
        vocab_size=whole["visual_vocab_size"],
        factor=encoder.merge_size,
        num_indicators=NUM_INDICATORS_2_5,
        **dtypes,
    )
    prefix = "visual_tokenizer.vit.vision_model."
    # Released as a convolution, or as a linear layer where the config has num_patches.
    weight = checkpoint.get(f"{prefix}embeddings.patch_embedding.weight")
    conv = weight is None or len(weight.shape) == 4
    tower = siglip2_navit.encoder_rules(
        width=encoder.width,
        window=(encoder.channels, encoder.patch_size, encoder.patch_size) if conv else None,
        table=encoder.table_side is not None,
    )
    rules = (*prefixed(tower, prefix, "encoder/"), *prefixed(_VOCABULARY, target="connector/"))
    inputs = packed_shapes(encoder.patch_dim, encoder.merge_size, encoder.window)
    ignore = (re.escape(prefix) + r"post_layernorm\.(weight|bias)",)
    visual = visual_half(encoder, connector, inputs, rules, ignore)
    return _with_llm(visual, {"model_type": "qwen3", **whole["llm_config"]}, checkpoint, "ovis2_5.llm_config", dtypes)


def _with_llm(
    visual: Description,
    text: Config,
    checkpoint: Mapping[str, SourceTensor],
    where: str,
    dtypes: Fields,
) -> Description:
    """The official files' language model; the indicators of the visual vocabulary come first in the table."""
    return with_language(visual, text, checkpoint, where, names=_LLM, beside=BESIDE, learned_rows="connector", **dtypes)


def navit(config: Config, where: str, **fields: Any) -> Siglip2NaViT:
    """The unbound tower of a `Siglip2NavitConfig`.

    Args:
      config: the released section.
      where: name of the section for errors.
      **fields: more fields of `Siglip2NaViT`.

    Raises:
      PretrainedError: unsupported settings.
    """
    settings = with_defaults(config, NAVIT_DEFAULTS, where)
    check_supported(settings, {"hidden_act": ("gelu_pytorch_tanh",), "temporal_patch_size": (1,)}, where)
    side = settings["image_size"] // settings["patch_size"]
    if settings["num_patches"] > 0:
        side = int(settings["num_patches"] ** 0.5)
    listed = settings["fullatt_block_indexes"]  # "7|15|23", or None where every layer is full
    full = None if listed is None else tuple(map(int, listed.split("|")))
    return Siglip2NaViT(
        table_side=side if settings["preserve_original_pe"] else None,
        patch_size=settings["patch_size"],
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        mlp_dim=settings["intermediate_size"],
        merge_size=settings["hidden_stride"],
        channels=settings["num_channels"],
        window_size=None if full is None else settings["window_size"],
        full_layers=full,
        use_rope=settings["use_rope"],
        norm_epsilon=settings["layer_norm_eps"],
        **fields,
    )


def _aimv2_fields(settings: Config) -> Fields:
    return {
        "image_size": (settings["image_size"], settings["image_size"]),
        "patch_size": settings["patch_size"],
        "width": settings["hidden_size"],
        "depth": settings["num_hidden_layers"],
        "num_heads": settings["num_attention_heads"],
        "mlp_dim": settings["intermediate_size"],
        "norm_epsilon": settings["rms_norm_eps"],
    }


def _pixels(encoder: AIMv2, settings: Config) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *encoder.image_size, settings["num_channels"]), jnp.float32)

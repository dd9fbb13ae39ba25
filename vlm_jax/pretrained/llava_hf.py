"""LLaVA, LLaVA-NeXT and LLaVA-OneVision of transformers: CLIP or SigLIP, a two-layer projector, a language model."""

import re
from collections.abc import Mapping

from vlm_jax.checkpoints.maps.clip import siglip_tower_rules
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.encoders.vit import ViT
from vlm_jax.pretrained import clip, llava, siglip
from vlm_jax.pretrained.composition import text_names, text_section, visual_half, with_language
from vlm_jax.pretrained.family import (
    REQUIRED,
    Description,
    PretrainedError,
    beside,
    check_supported,
    find_prefix,
    one_layer,
    with_defaults,
)
from vlm_jax.pretrained.hugging_face import projector
from vlm_jax.pretrained.tables import image_shape, left_out
from vlm_jax.types import Config, Dtype, Fields

# transformers, models/llava/configuration_llava.py and models/llava_next/configuration_llava_next.py.
DEFAULTS: Fields = {
    "vision_config": REQUIRED,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
}
# models/llava_onevision/configuration_llava_onevision.py.
ONEVISION: Fields = {
    **DEFAULTS,
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "patch_size": 14,
        "image_size": 384,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "vision_use_head": False,
    },
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": -1,
    "vision_aspect_ratio": "anyres_max_9",
}
# Model type of a tower -> the last part of a key that shows the prefix of its keys.
TOWERS = {"clip_vision_model": "embeddings.class_embedding", "siglip_vision_model": "embeddings.patch_embedding.weight"}


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `LlavaForConditionalGeneration`, or one of LLaVA-NeXT or LLaVA-OneVision with a learned `image_newline`.

    LLaVA's own releases also have the model type `llava`; they are recognised by `mm_vision_tower`.
    """
    where, dtypes = config["model_type"], {"dtype": dtype, "param_dtype": param_dtype}
    if "mm_vision_tower" in config:
        return llava.describe(config, checkpoint, **dtypes)
    settings = full_settings(config)
    known = {
        "projector_hidden_act": ("gelu",),
        "vision_feature_select_strategy": ("default", "full"),
        "multimodal_projector_bias": (True,),
    }
    check_supported(settings, known, where)
    vit, tower_rules = _tower(settings, where, dtypes)
    section = settings["vision_config"]
    tower = find_prefix(checkpoint, TOWERS[section["model_type"]])
    names, width, projector_rules = projector(checkpoint, where)
    ignore = (
        re.escape(tower) + r"(post_layernorm|embeddings\.position_ids|head\.).*",
        *left_out(vit, f"{tower}encoder.layers."),
    )
    rules = (
        *prefixed(tower_rules, tower, "encoder/"),
        *prefixed(projector_rules, target="connector/"),
    )
    pixels = image_shape(vit, section.get("num_channels", 3))
    visual = visual_half(vit, MlpConnector(width, **dtypes), pixels, rules, ignore)
    newline = f"{find_prefix(checkpoint, 'image_newline')}image_newline"
    return with_language(
        visual,
        text_section(config, checkpoint, kind="qwen2" if where == "llava_onevision" else "llama", tied=False),
        checkpoint,
        f"{where}.text_config",
        names=text_names(checkpoint),
        beside=beside(tower, names),
        learned_rows={"image_newline": newline} if newline in checkpoint else None,
        **dtypes,
    )


def full_settings(config: Config) -> Fields:
    """A released config with the defaults of its class; the section of the tower has its model type.

    Raises:
      PretrainedError: there is no such section, where the class has no default.
    """
    onevision = config["model_type"] == "llava_onevision"
    settings = with_defaults(config, ONEVISION if onevision else DEFAULTS, config["model_type"])
    kind = "siglip_vision_model" if onevision else "clip_vision_model"
    return {**settings, "vision_config": {"model_type": kind, **settings["vision_config"]}}


def keeps_class_token(settings: Config) -> bool:
    """Whether the features of a config from `full_settings` start with that of a class token.

    Raises:
      PretrainedError: the first patch would be dropped as if it were a class token.
    """
    whole = settings["vision_feature_select_strategy"] == "full"
    if settings["vision_config"]["model_type"] == "clip_vision_model":
        return whole
    if not whole:
        raise PretrainedError(
            f"{settings['model_type']}.vision_feature_select_strategy: expected 'full', since the tower has no class "
            f"token to drop, got {settings['vision_feature_select_strategy']!r}"
        )
    return False


def _tower(settings: Config, where: str, dtypes: Config) -> tuple[ViT, tuple[Rule, ...]]:
    """The tower up to the selected layer, and its rules."""
    section, place = settings["vision_config"], f"{where}.vision_config"
    check_supported(section, {"model_type": tuple(TOWERS)}, place)
    fields: Fields = {
        "pooling": "none",
        "final_norm": "none",
        "select_layer": one_layer(settings["vision_feature_layer"], f"{where}.vision_feature_layer"),
        "keep_class_token": keeps_class_token(settings),
        **dtypes,
    }
    if section["model_type"] == "siglip_vision_model":
        return siglip.vision_tower(section, place, **fields), siglip_tower_rules()
    vit = clip.vision_tower(section, place, **fields)
    return vit, clip.vision_rules(vit)

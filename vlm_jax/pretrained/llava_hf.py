"""LLaVA and LLaVA-NeXT in the format of transformers: CLIP, a two-layer projector and a language model."""

import re
from collections.abc import Mapping

from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.pretrained import clip, llava
from vlm_jax.pretrained.composition import text_names, text_section, visual_half, with_language
from vlm_jax.pretrained.family import (
    REQUIRED,
    Description,
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


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `LlavaForConditionalGeneration` or a `LlavaNextForConditionalGeneration` with a learned `image_newline`.

    LLaVA's own releases also have the model type `llava`; they are recognised by `mm_vision_tower`.
    """
    where, dtypes = config["model_type"], {"dtype": dtype, "param_dtype": param_dtype}
    if "mm_vision_tower" in config:
        return llava.describe(config, checkpoint, **dtypes)
    settings = with_defaults(config, DEFAULTS, where)
    known = {
        "projector_hidden_act": ("gelu",),
        "vision_feature_select_strategy": ("default", "full"),
        "multimodal_projector_bias": (True,),
    }
    check_supported(settings, known, where)
    section = settings["vision_config"]
    check_supported(section, {"model_type": ("clip_vision_model",)}, f"{where}.vision_config")
    vit = clip.vision_tower(
        section,
        f"{where}.vision_config",
        pooling="none",
        final_norm="none",
        select_layer=one_layer(settings["vision_feature_layer"], f"{where}.vision_feature_layer"),
        keep_class_token=settings["vision_feature_select_strategy"] == "full",
        **dtypes,
    )
    tower = find_prefix(checkpoint, "embeddings.class_embedding")
    names, width, projector_rules = projector(checkpoint, where)
    ignore = (
        re.escape(tower) + r"(post_layernorm|embeddings\.position_ids).*",
        *left_out(vit, f"{tower}encoder.layers."),
    )
    rules = (
        *prefixed(clip.vision_rules(vit), tower, "encoder/"),
        *prefixed(projector_rules, target="connector/"),
    )
    pixels = image_shape(vit, section.get("num_channels", 3))
    visual = visual_half(vit, MlpConnector(width, **dtypes), pixels, rules, ignore)
    newline = f"{find_prefix(checkpoint, 'image_newline')}image_newline"
    return with_language(
        visual,
        text_section(config, checkpoint, kind="llama", tied=False),
        checkpoint,
        f"{where}.text_config",
        names=text_names(checkpoint),
        beside=beside(tower, names),
        learned_rows={"image_newline": newline} if newline in checkpoint else None,
        **dtypes,
    )

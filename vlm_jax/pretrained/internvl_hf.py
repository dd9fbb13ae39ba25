"""InternVL in the format of transformers: InternViT, its projector and a language model."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.checkpoints.maps.internvl import hf_encoder_rules
from vlm_jax.checkpoints.maps.torch_layers import layer_norm
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.connectors.pixel_shuffle import PixelShuffle
from vlm_jax.encoders.vit import ViT
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
from vlm_jax.pretrained.hugging_face import projector, vit_fields
from vlm_jax.pretrained.internvl import INTERN_VIT, NORMS
from vlm_jax.pretrained.tables import image_shape, left_out, num_patches
from vlm_jax.types import Config, Dtype, Fields

# transformers, models/internvl/configuration_internvl.py.
VISION_DEFAULTS: Fields = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": False,
    "use_qk_norm": False,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "image_size": 448,
    "patch_size": 14,
    "num_channels": 3,
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "layer_scale_init_value": 0.1,
    "use_mean_pooling": True,
}
DEFAULTS: Fields = {
    "vision_config": REQUIRED,
    "downsample_ratio": 0.5,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
_QK_EPSILON = 1e-6  # of the class, independent of layer_norm_eps


def vision_tower(config: Config, where: str, **fields: Any) -> ViT:
    """The ViT of an `InternVLVisionConfig` without the norm after it.

    Args:
      config: the released section.
      where: name of the section for errors.
      **fields: more fields of `ViT`, or other values.
    """
    settings = with_defaults(config, VISION_DEFAULTS, where)
    known: dict[str, tuple[object, ...]] = {
        "norm_type": tuple(NORMS),
        "use_mask_token": (False,),
        "use_absolute_position_embeddings": (True,),
        "use_mean_pooling": (True,),
    }
    if settings["use_qk_norm"]:
        known["layer_norm_eps"] = (_QK_EPSILON,)
    check_supported(settings, known, where)
    own = {
        **vit_fields(settings, where),
        "norm": NORMS[settings["norm_type"]],
        "qkv_bias": settings["attention_bias"],
        "qk_norm": "rms" if settings["use_qk_norm"] else None,
        "layer_scale": settings["layer_scale_init_value"],
    }
    return ViT(**{**INTERN_VIT, **own, **fields})


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """An `InternVLModel`, or its model for generation."""
    where, dtypes = "internvl", {"dtype": dtype, "param_dtype": param_dtype}
    settings = with_defaults(config, DEFAULTS, where)
    known = {"projector_hidden_act": ("gelu",), "vision_feature_select_strategy": ("default",)}
    check_supported(settings, known, where)
    section = with_defaults(settings["vision_config"], VISION_DEFAULTS, f"{where}.vision_config")
    vit = vision_tower(
        section,
        f"{where}.vision_config",
        select_layer=one_layer(settings["vision_feature_layer"], f"{where}.vision_feature_layer"),
        **dtypes,
    )
    tower = find_prefix(checkpoint, "embeddings.cls_token")
    names, width, projector_rules = projector(checkpoint, where)
    connector = PixelShuffle(width, factor=round(1 / settings["downsample_ratio"]), **dtypes)
    encoder_rules = hf_encoder_rules(
        width=vit.width, num_patches=num_patches(vit), qkv_bias=vit.qkv_bias, rms=vit.norm == "rms"
    )
    visual = visual_half(
        vit,
        connector,
        image_shape(vit, section["num_channels"]),
        (
            *prefixed(encoder_rules, tower, "encoder/"),
            *prefixed((*layer_norm(f"{names}layer_norm", "norm"), *projector_rules), target="connector/"),
        ),
        left_out(vit, f"{tower}encoder.layer."),
    )
    return with_language(
        visual,
        text_section(config, checkpoint, kind="qwen2", tied=True),
        checkpoint,
        f"{where}.text_config",
        names=text_names(checkpoint),
        beside=beside(tower, names),
        **dtypes,
    )

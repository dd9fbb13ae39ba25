"""InternVL in the format of its release: InternViT, or a chat model with its projector and language model."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.checkpoints.maps import internvl as maps
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.connectors.pixel_shuffle import PixelShuffle
from vlm_jax.encoders.vit import ViT
from vlm_jax.pretrained.composition import visual_half, with_language
from vlm_jax.pretrained.family import REQUIRED, Description, Names, check_supported, find_prefix, with_defaults
from vlm_jax.pretrained.hugging_face import vit_fields
from vlm_jax.pretrained.tables import image_shape, left_out, num_patches, resizer
from vlm_jax.types import Config, Dtype, Fields

# OpenGVLab/InternVL, configuration_intern_vit.py and configuration_internvl_chat.py.
VISION_DEFAULTS: Fields = {
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 224,
    "qkv_bias": False,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "qk_normalization": True,
    "num_hidden_layers": 48,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "initializer_factor": 0.1,
}
DEFAULTS: Fields = {
    "vision_config": REQUIRED,
    "llm_config": REQUIRED,
    "select_layer": -1,
    "downsample_ratio": 0.5,
    "ps_version": "v1",
}
NORMS = {"rms_norm": "rms", "layer_norm": "layer"}
PREFIX = "vision_model."
BESIDE = (r"language_model\..*",)

# Fields of `ViT` that every InternViT has.
INTERN_VIT: Fields = {
    "qk_norm_over": "width",
    "class_token": True,
    "class_position": True,
    "final_norm": "none",
}


def vision_tower(config: Config, where: str, **fields: Any) -> ViT:
    """The InternViT of an `InternVisionConfig`.

    Args:
      config: the released section.
      where: name of the section for errors.
      **fields: more fields of `ViT`, or other values.
    """
    settings = with_defaults(config, VISION_DEFAULTS, where)
    check_supported(settings, {"norm_type": tuple(NORMS)}, where)
    own = {
        **vit_fields(settings, where),
        "norm": NORMS[settings["norm_type"]],
        "qkv_bias": settings["qkv_bias"],
        "qk_norm": "rms" if settings["qk_normalization"] else None,
        "layer_scale": settings["initializer_factor"],
    }
    return ViT(**{**INTERN_VIT, **own, **fields})


def vision_rules(vit: ViT) -> tuple[Rule, ...]:
    """The rules of a `vision_tower`."""
    return maps.encoder_rules(
        width=vit.width, num_patches=num_patches(vit), qkv_bias=vit.qkv_bias, rms=vit.norm == "rms"
    )


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """An `InternVLChatModel`."""
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    settings = with_defaults(config, DEFAULTS, "internvl_chat")
    check_supported(settings, {"ps_version": ("v1", "v2")}, "internvl_chat")
    section = with_defaults(settings["vision_config"], VISION_DEFAULTS, "internvl_chat.vision_config")
    vit = vision_tower(
        section,
        "internvl_chat.vision_config",
        select_layer=settings["select_layer"],
        **dtypes,
    )
    text = with_defaults(
        settings["llm_config"], {"hidden_size": REQUIRED, "model_type": REQUIRED}, "internvl_chat.llm_config"
    )
    connector = PixelShuffle(
        text["hidden_size"],
        factor=round(1 / settings["downsample_ratio"]),
        version=settings["ps_version"],
        **dtypes,
    )
    visual = visual_half(
        vit,
        connector,
        image_shape(vit, section["num_channels"]),
        (
            *prefixed(vision_rules(vit), PREFIX, "encoder/"),
            *prefixed(maps.projector_rules(), target="connector/"),
        ),
        left_out(vit, f"{PREFIX}encoder.layers."),
    )
    names = Names("language_model.model.", "language_model.")
    return with_language(visual, text, checkpoint, "internvl_chat.llm_config", names=names, beside=BESIDE, **dtypes)


def describe_vision(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """An `InternVisionModel`."""
    channels = with_defaults(config, VISION_DEFAULTS, "intern_vit_6b")["num_channels"]
    vit = vision_tower(config, "intern_vit_6b", dtype=dtype, param_dtype=param_dtype)
    prefix = find_prefix(checkpoint, "embeddings.class_embedding")
    resize = resizer(config, vit, size_key=("image_size",))
    return Description(vit, (image_shape(vit, channels),), prefixed(vision_rules(vit), prefix), resize=resize)

"""CLIP of transformers: both towers, or one, with its projection or without."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.maps.clip import clip_rules, clip_text_rules, clip_vision_rules
from vlm_jax.checkpoints.ops import LINEAR
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.decoders.text_tower import TextTower
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.pretrained.family import Description, find_prefix, with_defaults
from vlm_jax.pretrained.hugging_face import block_fields, vit_fields
from vlm_jax.pretrained.tables import image_shape, num_patches, resizer
from vlm_jax.types import Config, Dtype, Fields

# transformers, models/clip/configuration_clip.py.
VISION_DEFAULTS: Fields = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
TEXT_DEFAULTS: Fields = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
DEFAULTS: Fields = {"projection_dim": 512, "logit_scale_init_value": 2.6592}
IGNORE = (r".*embeddings\.position_ids",)  # 0, 1, 2, .. in files of older versions
# Before transformers 4.31 configs had this number, and the end of text was the highest id.
_LEGACY_END = 2


def vision_tower(config: Config, where: str, **fields: Any) -> ViT:
    """The ViT of a `CLIPVisionConfig`; its pooled vector is the normalised class token.

    Args:
      config: the released section.
      where: name of the section for errors.
      **fields: more fields of `ViT`, or other values: `select_layer=-2, pooling="none"` for LLaVA.
    """
    settings = with_defaults(config, VISION_DEFAULTS, where)
    own = {
        **vit_fields(settings, where),
        "patch_bias": False,
        "class_token": True,
        "class_position": True,
        "pre_norm": True,
        "final_norm": "pooled",
        "pooling": "token",
    }
    return ViT(**{**own, **fields})


def text_tower(config: Config, where: str, **fields: Any) -> TextTower:
    """The text tower of a `CLIPTextConfig`, without its projection; arguments as in `vision_tower`."""
    settings = with_defaults(config, TEXT_DEFAULTS, where)
    end = settings["eos_token_id"]
    own = {
        **block_fields(settings, where),
        "vocab_size": settings["vocab_size"],
        "context_length": settings["max_position_embeddings"],
        "causal": True,
        "pooling": "highest" if end == _LEGACY_END else "end",
        "end_token": None if end == _LEGACY_END else end,
        "projection_bias": False,
    }
    return TextTower(**{**own, **fields})


def sections(config: Config) -> dict[str, Fields]:
    """The sections `vision_config` and `text_config` of a `CLIPModel`.

    Where a release has both, `.._config_dict` has the values that differ from the defaults, and takes precedence.
    """
    return {
        name: {**(config.get(name) or {}), **(config.get(f"{name}_dict") or {})}
        for name in ("vision_config", "text_config")
    }


def vision_rules(vit: ViT) -> tuple[Rule, ...]:
    """The rules of a `vision_tower`."""
    return clip_vision_rules(vit.width, num_patches(vit))


TEXT_SHAPE = jax.ShapeDtypeStruct((1, 1), jnp.int32)


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `CLIPModel`."""
    del checkpoint
    settings = with_defaults(config, DEFAULTS, "clip")
    towers = sections(config)
    fields = {"projection_dim": settings["projection_dim"], "dtype": dtype, "param_dtype": param_dtype}
    vision = vision_tower(towers["vision_config"], "clip.vision_config", **fields)
    text = text_tower(towers["text_config"], "clip.text_config", **fields)
    channels = with_defaults(towers["vision_config"], VISION_DEFAULTS, "clip.vision_config")["num_channels"]
    return Description(
        TwoTower(vision, text, settings["logit_scale_init_value"]),
        (image_shape(vision, channels), TEXT_SHAPE),
        (
            *prefixed(vision_rules(vision), "vision_model.", "image/"),
            *prefixed(clip_text_rules(), "text_model.", "text/"),
            *clip_rules(),
        ),
        IGNORE,
        resizer(config, vision, path=("image",), size_key=("vision_config", "image_size")),
    )


def describe_vision(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `CLIPVisionModel`, or a `CLIPVisionModelWithProjection` where the checkpoint has the projection."""
    settings = with_defaults(config, VISION_DEFAULTS, "clip_vision_model")
    projected = "visual_projection.weight" in checkpoint
    fields = {"dtype": dtype, "param_dtype": param_dtype}
    vision = vision_tower(
        config,
        "clip_vision_model",
        projection_dim=settings["projection_dim"] if projected else None,
        **fields,
    )
    prefix = find_prefix(checkpoint, "embeddings.class_embedding")
    return Description(
        vision,
        (image_shape(vision, settings["num_channels"]),),
        (
            *prefixed(vision_rules(vision), prefix),
            Rule("visual_projection.weight", "projection/kernel", LINEAR),
        ),
        IGNORE,
        resizer(config, vision, size_key=("image_size",)),
    )


def describe_text(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `CLIPTextModel`, or a `CLIPTextModelWithProjection` where the checkpoint has the projection."""
    settings = with_defaults(config, TEXT_DEFAULTS, "clip_text_model")
    projected = "text_projection.weight" in checkpoint
    fields = {"dtype": dtype, "param_dtype": param_dtype}
    text = text_tower(
        config, "clip_text_model", projection_dim=settings["projection_dim"] if projected else None, **fields
    )
    prefix = find_prefix(checkpoint, "embeddings.token_embedding.weight")
    rules = (
        *prefixed(clip_text_rules(), prefix),
        Rule("text_projection.weight", "projection/kernel", LINEAR),
    )
    return Description(text, (TEXT_SHAPE,), rules, IGNORE)

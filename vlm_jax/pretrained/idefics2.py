"""Idefics2 of transformers: SigLIP at native resolution with the perceiver, or only the tower."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.checkpoints.maps.clip import idefics2_vision_rules
from vlm_jax.checkpoints.maps.perceiver import perceiver_rules
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.connectors.perceiver import Perceiver
from vlm_jax.encoders.naflex import NaflexViT
from vlm_jax.pretrained.composition import visual_half
from vlm_jax.pretrained.family import (
    ACTIVATIONS,
    Description,
    PretrainedError,
    check_supported,
    find_prefix,
    one_side,
    with_defaults,
)
from vlm_jax.pretrained.hugging_face import block_fields
from vlm_jax.pretrained.siglip import patches_shape
from vlm_jax.types import Config, Dtype, Fields

# transformers, models/idefics2/configuration_idefics2.py.
VISION_DEFAULTS: Fields = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
PERCEIVER_DEFAULTS: Fields = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "rms_norm_eps": 1e-6,
    "resampler_n_latents": 64,
    "resampler_depth": 3,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "num_key_value_heads": 4,
}
# MistralConfig's, which Idefics2Config changes where the section is missing.
TEXT_DEFAULTS: Fields = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
_TEXT_LEFT_OUT: Fields = {"rms_norm_eps": 1e-5}
_PROJECTION = "connector.modality_projection.down_proj.weight"
IGNORE = (r"(.*\.)?text_model\..*", r"lm_head\..*", r".*position_ids")


def vision_tower(config: Config, where: str, **fields: Any) -> NaflexViT:
    """The ViT of an `Idefics2VisionConfig`.

    Args:
      config: the released section.
      where: name of the section for errors.
      **fields: more fields of `NaflexViT`.
    """
    settings = with_defaults(config, VISION_DEFAULTS, where)
    patch_size = one_side(settings["patch_size"], f"{where}.patch_size")
    side = one_side(settings["image_size"], f"{where}.image_size") // patch_size
    return NaflexViT(
        patch_size=patch_size,
        channels=settings["num_channels"],
        table_grid=(side, side),
        position_interpolation="nearest",
        **block_fields(settings, where),
        **fields,
    )


def perceiver(config: Config, shape: tuple[int, ...], where: str, **fields: Any) -> Perceiver:
    """The connector of an `Idefics2Config`.

    Args:
      config: the full released config.
      shape: released shape of the feed-forward's last weight: the decoder's width, the hidden width.
      where: name of the config for errors.
      **fields: more fields of `Perceiver`.
    """
    settings = with_defaults(config.get("perceiver_config") or {}, PERCEIVER_DEFAULTS, f"{where}.perceiver_config")
    text = with_defaults(config.get("text_config") or _TEXT_LEFT_OUT, TEXT_DEFAULTS, f"{where}.text_config")
    check_supported(settings, {"hidden_act": tuple(ACTIVATIONS)}, f"{where}.perceiver_config")
    check_supported(text, {"hidden_act": (settings["hidden_act"],)}, f"{where}.text_config")
    features, projection_dim = shape
    # A section of another width has unset defaults; the release then also uses the text's epsilon.
    own = settings["hidden_size"] == features
    return Perceiver(
        features=features,
        num_queries=settings["resampler_n_latents"],
        depth=settings["resampler_depth"],
        num_heads=settings["resampler_n_heads"],
        num_kv_heads=settings["num_key_value_heads"],
        head_dim=settings["resampler_head_dim"],
        projection_dim=projection_dim,
        activation=ACTIVATIONS[settings["hidden_act"]],
        norm_epsilon=settings["rms_norm_eps"] if own else text["rms_norm_eps"],
        **fields,
    )


def _vision_rules(vit: NaflexViT) -> tuple[Rule, ...]:
    return idefics2_vision_rules(vit.width, vit.patch_size, vit.channels)


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """Vision tower and connector of an `Idefics2Model`, one image per sequence; the language model is not loaded."""
    where, dtypes = "idefics2", {"dtype": dtype, "param_dtype": param_dtype}
    prefix = find_prefix(checkpoint, _PROJECTION)
    if prefix + _PROJECTION not in checkpoint:
        raise PretrainedError(f"{where}: expected a tensor named {_PROJECTION}, which gives the width of the decoder")
    vit = vision_tower(config.get("vision_config") or {}, f"{where}.vision_config", **dtypes)
    connector = perceiver(config, checkpoint[prefix + _PROJECTION].shape, where, **dtypes)
    rules = (
        *prefixed(_vision_rules(vit), f"{prefix}vision_model.", "encoder/"),
        *prefixed(perceiver_rules(), f"{prefix}connector.", "connector/"),
    )
    return visual_half(vit, connector, patches_shape(vit, vit.channels), rules, IGNORE)


def describe_vision(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """An `Idefics2VisionTransformer`."""
    vit = vision_tower(config, config["model_type"], dtype=dtype, param_dtype=param_dtype)
    prefix = find_prefix(checkpoint, "embeddings.patch_embedding.weight")
    return Description(vit, (patches_shape(vit, vit.channels),), prefixed(_vision_rules(vit), prefix), IGNORE)

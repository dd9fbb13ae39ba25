"""DINOv2 of transformers, with and without registers: the tower, or with a classification head."""

import re
from collections.abc import Mapping
from typing import Any

from vlm_jax.checkpoints.maps.dinov2 import encoder_rules
from vlm_jax.checkpoints.maps.torch_layers import linear
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.classifier import Classifier
from vlm_jax.pretrained.family import Description, find_prefix, with_defaults
from vlm_jax.pretrained.hugging_face import vit_fields
from vlm_jax.pretrained.tables import image_shape, num_patches, resizer
from vlm_jax.types import Config, Dtype, Fields

# transformers, models/dinov2/configuration_dinov2.py and models/dinov2_with_registers/configuration_…py.
DEFAULTS: Fields = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
}
REGISTER_DEFAULTS: Fields = {**DEFAULTS, "patch_size": 16, "num_register_tokens": 4}


def encoder(settings: Config, where: str, **fields: Any) -> ViT:
    """The ViT of a `Dinov2Config` or a `Dinov2WithRegistersConfig`, without a pooling.

    Args:
      settings: the released section, with its defaults.
      where: name of the section for errors.
      **fields: more fields of `ViT`, or other values.
    """
    hidden = int(settings["hidden_size"] * settings["mlp_ratio"])
    gated, registers = settings["use_swiglu_ffn"], settings.get("num_register_tokens")
    if gated:  # two thirds, rounded up to a multiple of 8
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    own = {
        **vit_fields({**settings, "intermediate_size": hidden}, where),
        "qkv_bias": settings["qkv_bias"],
        "layer_scale": settings["layerscale_value"],
        "class_token": True,
        "class_position": True,
        **({"gated": True, "activation": "silu"} if gated else {}),
    }
    if registers is not None:  # transformers antialiases the table's interpolation only in this class
        own |= {"num_registers": registers, "position_interpolation": "bicubic_antialias"}
    return ViT(**{**own, **fields})


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `Dinov2Model` or a `Dinov2ForImageClassification`."""
    settings = with_defaults(config, DEFAULTS, "dinov2")
    return _description(config, settings, checkpoint, "dinov2", {"dtype": dtype, "param_dtype": param_dtype})


def describe_with_registers(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `Dinov2WithRegistersModel` or a `Dinov2WithRegistersForImageClassification`."""
    where, dtypes = "dinov2_with_registers", {"dtype": dtype, "param_dtype": param_dtype}
    return _description(config, with_defaults(config, REGISTER_DEFAULTS, where), checkpoint, where, dtypes)


def _description(
    config: Config, settings: Config, checkpoint: Mapping[str, SourceTensor], where: str, dtypes: Fields
) -> Description:
    """A classifier if the checkpoint has its head, else the encoder, pooled by its class token."""
    classes = "classifier.weight" in checkpoint
    vit = encoder(settings, where, pooling="token_gap" if classes else "token", **dtypes)
    prefix = find_prefix(checkpoint, "embeddings.cls_token")
    rules = encoder_rules(
        vit.width,
        num_patches(vit),
        num_registers=vit.num_registers,
        qkv_bias=vit.qkv_bias,
        gated_dim=vit.mlp_dim if vit.gated else None,
    )
    image = image_shape(vit, settings["num_channels"])
    ignore = (re.escape(f"{prefix}embeddings.mask_token"),)  # of the pretraining
    if not classes:
        resize = resizer(config, vit, size_key=("image_size",))
        return Description(vit, (image,), prefixed(rules, prefix), ignore, resize)
    return Description(
        Classifier(vit, checkpoint["classifier.weight"].shape[0]),
        (image,),
        (*prefixed(rules, prefix, "encoder/"), *linear("classifier", "head")),
        ignore,
        resizer(config, vit, path=("encoder",), size_key=("image_size",)),
    )

"""ViT of transformers: `ViTModel`, with its pooler, and `ViTForImageClassification`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.maps.torch_layers import linear
from vlm_jax.checkpoints.maps.vit import encoder_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.classifier import Classifier
from vlm_jax.pretrained.family import (
    ACTIVATIONS,
    Description,
    check_supported,
    find_prefix,
    one_side,
    with_defaults,
)
from vlm_jax.pretrained.tables import resizer

# transformers, models/vit/configuration_vit.py, ViTConfig.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
    "pooler_output_size": None,
    "pooler_act": "tanh",
}


def encoder(config: Mapping[str, Any], where: str, **fields: Any) -> ViT:
    """The ViT of a `ViTConfig`, without heads.

    Args:
      config: the released section.
      where: names the section in messages.
      **fields: more fields of `ViT`, or other values.
    """
    settings = with_defaults(config, DEFAULTS, where)
    check_supported(settings, {"hidden_act": tuple(ACTIVATIONS), "pooler_act": ("tanh",)}, where)
    side = one_side(settings["image_size"], f"{where}.image_size")
    own = {
        "image_size": (side, side),
        "patch_size": one_side(settings["patch_size"], f"{where}.patch_size"),
        "width": settings["hidden_size"],
        "depth": settings["num_hidden_layers"],
        "num_heads": settings["num_attention_heads"],
        "mlp_dim": settings["intermediate_size"],
        "activation": ACTIVATIONS[settings["hidden_act"]],
        "norm_epsilon": settings["layer_norm_eps"],
        "qkv_bias": settings["qkv_bias"],
        "class_token": True,
        "class_position": True,
        "position_interpolation": "bicubic",
    }
    return ViT(**{**own, **fields})


def describe(
    config: Mapping[str, Any], checkpoint: Mapping[str, SourceTensor], *, dtype: Any, param_dtype: Any
) -> Description:
    """A classifier where the checkpoint has its head, else the encoder, pooled where it has a pooler."""
    settings = with_defaults(config, DEFAULTS, "vit")
    fields: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
    prefix = find_prefix(checkpoint, "embeddings.cls_token")
    classes = "classifier.weight" in checkpoint
    if classes:
        fields["pooling"] = "token"
    elif f"{prefix}pooler.dense.weight" in checkpoint:
        representation = settings["pooler_output_size"] or settings["hidden_size"]
        fields |= {"pooling": "token", "representation_size": representation}
    vit = encoder(config, "vit", **fields)
    side = vit.grid(*vit.image_size)[0] if vit.image_size else 0
    rules = encoder_rules(vit.width, side * side, qkv_bias=vit.qkv_bias)
    image = jax.ShapeDtypeStruct((1, vit.patch_size, vit.patch_size, settings["num_channels"]), jnp.float32)
    if not classes:
        return Description(
            vit, (image,), prefixed(rules, prefix), resize=resizer(config, vit, size_key=("image_size",))
        )
    return Description(
        Classifier(vit, checkpoint["classifier.weight"].shape[0]),
        (image,),
        (*prefixed(rules, prefix, "encoder/"), *linear("classifier", "head")),
        resize=resizer(config, vit, path=("encoder",), size_key=("image_size",)),
    )

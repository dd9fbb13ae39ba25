"""DINOv3 of transformers: the vision transformer, pooled by its class token."""

import re
from collections.abc import Mapping
from typing import Any

from vlm_jax.checkpoints.maps.dinov3 import encoder_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.encoders.vit import ViT
from vlm_jax.pretrained.family import Description, PretrainedError, find_prefix, one_side, with_defaults
from vlm_jax.pretrained.hugging_face import block_fields
from vlm_jax.pretrained.tables import image_shape, resizer
from vlm_jax.types import Config, Dtype, Fields

# transformers, models/dinov3_vit/configuration_dinov3_vit.py.
DEFAULTS: Fields = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "patch_size": 16,
    "num_channels": 3,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "layerscale_value": 1.0,
    "use_gated_mlp": False,
    "num_register_tokens": 0,
}


def encoder(settings: Config, where: str, **fields: Any) -> ViT:
    """The ViT of a `DINOv3ViTConfig`, without a pooling.

    Args:
      settings: the released section, with its defaults.
      where: name of the section for errors.
      **fields: more fields of `ViT`, or other values.

    Raises:
      PretrainedError: an unsupported activation, a bias of only one of query and value, patches that are not square,
        or a width of heads without 2D rotary positions.
    """
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    if settings["query_bias"] != settings["value_bias"]:
        raise PretrainedError(
            f"{where}.query_bias: expected value_bias, {settings['value_bias']}, got {settings['query_bias']}; a bias "
            "of only one of them is not supported"
        )
    if width % (4 * heads):
        raise PretrainedError(
            f"{where}.num_attention_heads: expected heads of a width that is a multiple of 4, for rotary positions of "
            f"rows and columns, got {heads} heads of hidden_size {width}"
        )
    own = {
        **block_fields(settings, where),
        "image_size": None,  # no table
        "patch_size": one_side(settings["patch_size"], f"{where}.patch_size"),
        "position": "rotary",
        "rope_theta": settings["rope_theta"],
        "qkv_bias": settings["query_bias"],
        "key_bias": settings["key_bias"],
        "use_bias": settings["proj_bias"],
        "mlp_bias": settings["mlp_bias"],
        "layer_scale": settings["layerscale_value"],
        "gated": settings["use_gated_mlp"],
        "class_token": True,
        "num_registers": settings["num_register_tokens"],
    }
    return ViT(**{**own, **fields})


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `DINOv3ViTModel`, or the same weights of a `DINOv3ViTBackbone`."""
    settings = with_defaults(config, DEFAULTS, "dinov3_vit")
    vit = encoder(settings, "dinov3_vit", pooling="token", dtype=dtype, param_dtype=param_dtype)
    prefix = find_prefix(checkpoint, "embeddings.cls_token")
    nested = f"{prefix}model.layer.0.norm1.weight" in checkpoint
    rules = encoder_rules(
        vit.width,
        layers="model.layer" if nested else "layer",
        num_registers=vit.num_registers,
        qkv_bias=settings["query_bias"],
        key_bias=settings["key_bias"],
        bias=settings["proj_bias"],
        mlp_bias=settings["mlp_bias"],
        gated=vit.gated,
    )
    unused = [f"{prefix}embeddings.mask_token"]  # of the pretraining
    if not vit.num_registers:  # transformers has an empty tensor
        unused.append(f"{prefix}embeddings.register_tokens")
    image = image_shape(vit, settings["num_channels"])
    resize = resizer(config, vit, size_key=("image_size",))
    return Description(vit, (image,), prefixed(rules, prefix), tuple(map(re.escape, unused)), resize)

"""ViT of transformers: `ViTModel`, with its pooler, and `ViTForImageClassification`."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.checkpoints.maps.torch_layers import linear
from vlm_jax.checkpoints.maps.vit import encoder_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.classifier import Classifier
from vlm_jax.pretrained.family import Description, check_supported, find_prefix, with_defaults
from vlm_jax.pretrained.hugging_face import vit_fields
from vlm_jax.pretrained.tables import image_shape, num_patches, resizer
from vlm_jax.types import Config, Dtype, Fields

# transformers, models/vit/configuration_vit.py, ViTConfig.
DEFAULTS: Fields = {
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


def encoder(config: Config, where: str, **fields: Any) -> ViT:
    """The ViT of a `ViTConfig`, without heads.

    Args:
      config: the released section.
      where: name of the section for errors.
      **fields: more fields of `ViT`, or other values.
    """
    settings = with_defaults(config, DEFAULTS, where)
    check_supported(settings, {"pooler_act": ("tanh",)}, where)
    own = {
        **vit_fields(settings, where),
        "qkv_bias": settings["qkv_bias"],
        "class_token": True,
        "class_position": True,
    }
    return ViT(**{**own, **fields})


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A classifier if the checkpoint has its head, else the encoder, pooled if it has a pooler."""
    settings = with_defaults(config, DEFAULTS, "vit")
    fields: Fields = {"dtype": dtype, "param_dtype": param_dtype}
    prefix = find_prefix(checkpoint, "embeddings.cls_token")
    classes = "classifier.weight" in checkpoint
    if classes:
        fields["pooling"] = "token"
    elif f"{prefix}pooler.dense.weight" in checkpoint:
        representation = settings["pooler_output_size"] or settings["hidden_size"]
        fields |= {"pooling": "token", "representation_size": representation}
    vit = encoder(config, "vit", **fields)
    rules = encoder_rules(vit.width, num_patches(vit), qkv_bias=vit.qkv_bias)
    image = image_shape(vit, settings["num_channels"])
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

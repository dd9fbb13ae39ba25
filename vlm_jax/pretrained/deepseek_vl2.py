"""DeepSeek-VL2's SigLIP and projector, as its own release stores them."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from vlm_jax.checkpoints.maps.deepseek_vl import siglip_rules
from vlm_jax.checkpoints.maps.deepseek_vl2 import projector_rules
from vlm_jax.checkpoints.maps.torch_layers import linear, linear_stack
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.connectors.pixel_shuffle import PixelShuffle
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.visual_prefix import VisualPrefix
from vlm_jax.pretrained.family import REQUIRED, Description, check_supported, with_defaults
from vlm_jax.pretrained.tables import image_shape, num_patches

# deepseek_vl2/models/modeling_deepseek_vl_v2.py, VisionEncoderConfig and MlpProjectorConfig.
VISION_DEFAULTS: dict[str, Any] = {
    "image_size": 384,
    "patch_size": 16,
    "width": 1024,
    "layers": 24,
    "heads": 16,
    "mlp_ratio": 4,
    "class_token": False,
}
PROJECTOR_DEFAULTS: dict[str, Any] = {
    "projector_type": "downsample_mlp_gelu",
    "input_dim": 1152,
    "n_embed": 2048,
    "depth": 2,
    "mlp_ratio": 1,
    "downsample_ratio": 2,
    "token_pooling": False,
}
BESIDE = (r"language\..*", "image_newline", "view_seperator")
UNUSED = (r"vision\.attn_pool\..*",)


def describe(
    config: Mapping[str, Any], checkpoint: Mapping[str, SourceTensor], *, dtype: Any, param_dtype: Any
) -> Description:
    """`DeepseekVLV2ForCausalLM`'s tower and projector; language model and separators are carried along."""
    del checkpoint  # the release has one schema
    where, dtypes = "deepseek_vl_v2", {"dtype": dtype, "param_dtype": param_dtype}
    settings = with_defaults(config, {"vision_config": REQUIRED, "projector_config": REQUIRED}, where)
    vit = vision_tower(settings["vision_config"], f"{where}.vision_config", **dtypes)
    connector, connector_rules = projector(settings["projector_config"], f"{where}.projector_config", **dtypes)
    rules = (
        *prefixed(siglip_rules(num_patches=num_patches(vit), width=vit.width), "vision.", "encoder/"),
        *prefixed(connector_rules, target="connector/"),
    )
    return Description(VisualPrefix(vit, connector), (image_shape(vit, 3),), rules, (*BESIDE, *UNUSED))


def projector(config: Mapping[str, Any], where: str, **dtypes: Any) -> tuple[nn.Module, tuple[Rule, ...]]:
    """The connector of an `MlpProjectorConfig`, and its rules.

    Args:
      config: the released section.
      where: names the section in messages.
      **dtypes: `dtype` and `param_dtype`.
    """
    settings = with_defaults(config, PROJECTOR_DEFAULTS, where)
    known = ("downsample_mlp_gelu", "mlp_gelu", "linear")
    check_supported(settings, {"projector_type": known, "token_pooling": (False,)}, where)
    kind, features, depth = settings["projector_type"], settings["n_embed"], settings["depth"]
    if kind == "linear":
        return MlpConnector(features, depth=1, **dtypes), linear("projector.layers", "mlp/down")
    if kind == "mlp_gelu":
        return MlpConnector(features, depth=depth, **dtypes), linear_stack("projector.layers", "mlp", depth)
    connector = PixelShuffle(
        features,
        factor=settings["downsample_ratio"],
        norm=None,
        mlp_dim=features * settings["mlp_ratio"],
        depth=max(depth, 2),  # the release's code always has a last layer
        **dtypes,
    )
    rules = projector_rules(
        width=settings["input_dim"],
        factor=connector.factor,
        hidden_dim=features * settings["mlp_ratio"],
        depth=connector.depth,
    )
    return connector, rules


def vision_tower(config: Mapping[str, Any], where: str, **fields: Any) -> ViT:
    """The ViT of a `VisionEncoderConfig`, whose blocks are all used.

    Args:
      config: the released section.
      where: names the section in messages.
      **fields: more fields of `ViT`.
    """
    settings = with_defaults(config, VISION_DEFAULTS, where)
    check_supported(settings, {"class_token": (False,)}, where)
    side = settings["image_size"]
    return ViT(
        image_size=(side, side),
        patch_size=settings["patch_size"],
        width=settings["width"],
        depth=settings["layers"],
        num_heads=settings["heads"],
        mlp_dim=int(settings["width"] * settings["mlp_ratio"]),
        activation="gelu_tanh",
        norm_epsilon=1e-6,
        **fields,
    )

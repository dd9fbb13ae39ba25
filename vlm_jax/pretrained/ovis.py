"""The vision towers of Ovis 2 (official files and the port in transformers) and Ovis 2.5."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.maps import aimv2, siglip2_navit
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.encoders.aimv2 import AIMv2
from vlm_jax.encoders.siglip2_navit import Siglip2NaViT
from vlm_jax.pretrained.family import REQUIRED, Description, check_supported, find_prefix, with_defaults
from vlm_jax.pretrained.qwen2_vl import beside, packed_shapes

# AIDC-AI/Ovis2, modeling_aimv2.py, AIMv2Config; sizes differ between releases and must be given.
AIMV2_DEFAULTS: dict[str, Any] = {
    "hidden_size": REQUIRED,
    "intermediate_size": REQUIRED,
    "num_hidden_layers": REQUIRED,
    "num_attention_heads": REQUIRED,
    "num_channels": 3,
    "image_size": REQUIRED,
    "patch_size": 14,
    "rms_norm_eps": 1e-5,
    "qkv_bias": False,
    "use_bias": False,
}
# transformers, models/ovis2/configuration_ovis2.py, Ovis2VisionConfig.
OVIS2_HF_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "rms_norm_eps": 1e-5,
    "qkv_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "hidden_stride": 1,
}
# AIDC-AI/Ovis2.5-9B, configuration_ovis2_5.py, Siglip2NavitConfig.
NAVIT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_patches": -1,
    "image_size": 512,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "hidden_stride": 2,
    "window_size": 112,
    "fullatt_block_indexes": None,
    "temporal_patch_size": 1,
    "preserve_original_pe": True,
    "use_rope": True,
}


def describe_ovis2(
    config: Mapping[str, Any], checkpoint: Mapping[str, SourceTensor], *, dtype: Any, param_dtype: Any
) -> Description:
    """Ovis 2 under its own names; language model, visual vocabulary and its head are carried along."""
    tokenizer = with_defaults(
        config.get("visual_tokenizer_config", {}), {"backbone_config": REQUIRED, "hidden_stride": 1},
        "ovis.visual_tokenizer_config",
    )  # fmt: skip
    where = "ovis.visual_tokenizer_config.backbone_config"
    settings = with_defaults(tokenizer["backbone_config"], AIMV2_DEFAULTS, where)
    check_supported(settings, {"model_type": ("aimv2",)}, where)
    module = AIMv2(
        hidden_stride=tokenizer["hidden_stride"],
        qkv_bias=settings["qkv_bias"],
        use_bias=settings["use_bias"],
        **_aimv2_fields(settings),
        dtype=dtype,
        param_dtype=param_dtype,
    )
    rules = aimv2.encoder_rules(
        width=module.width,
        num_patches=(settings["image_size"] // settings["patch_size"]) ** 2,
        qkv_bias=module.qkv_bias,
        use_bias=module.use_bias,
    )
    names = ("preprocessor.patchifier.proj.weight", r"trunk\.post_trunk_norm\.weight")
    return _of_images(module, settings, checkpoint, rules, *names)


def describe_ovis2_hf(
    config: Mapping[str, Any], checkpoint: Mapping[str, SourceTensor], *, dtype: Any, param_dtype: Any
) -> Description:
    """Ovis 2 as transformers stores it, which normalises features before they are merged."""
    settings = with_defaults(config.get("vision_config", config), OVIS2_HF_DEFAULTS, "ovis2.vision_config")
    expected = {"hidden_act": ("silu",), "mlp_bias": (settings["qkv_bias"],)}
    check_supported(settings, expected, "ovis2.vision_config")
    module = AIMv2(
        hidden_stride=settings["hidden_stride"],
        qkv_bias=settings["qkv_bias"],
        use_bias=settings["mlp_bias"],
        final_norm=True,
        **_aimv2_fields(settings),
        dtype=dtype,
        param_dtype=param_dtype,
    )
    rules = aimv2.hf_encoder_rules(bias=settings["mlp_bias"])
    return _of_images(module, settings, checkpoint, rules, "embeddings.patch_embedding.weight")


def describe_ovis2_5(
    config: Mapping[str, Any], checkpoint: Mapping[str, SourceTensor], *, dtype: Any, param_dtype: Any
) -> Description:
    """Ovis 2.5; language model, visual vocabulary and its head are carried along."""
    module = navit(config.get("vit_config", config), "ovis2_5.vit_config", dtype=dtype, param_dtype=param_dtype)
    ending = "embeddings.patch_embedding.weight"
    prefix = find_prefix(checkpoint, ending)
    # Released as a convolution, or as a linear layer where the config gives num_patches.
    weight = checkpoint.get(prefix + ending)
    conv = weight is None or len(weight.shape) == 4
    rules = siglip2_navit.encoder_rules(
        width=module.width,
        window=(module.channels, module.patch_size, module.patch_size) if conv else None,
        table=module.table_side is not None,
    )
    inputs = packed_shapes(module.patch_dim, module.hidden_stride, module.window)
    return Description(
        module, (inputs,), prefixed(rules, source=prefix), beside(prefix, r"post_layernorm\.(weight|bias)")
    )


def navit(config: Mapping[str, Any], where: str, **fields: Any) -> Siglip2NaViT:
    """The tower of a `Siglip2NavitConfig`, before its parameters.

    Args:
      config: the released section.
      where: names the section in messages.
      **fields: more fields of `Siglip2NaViT`.

    Raises:
      PretrainedError: settings that are not computed here.
    """
    settings = with_defaults(config, NAVIT_DEFAULTS, where)
    check_supported(settings, {"hidden_act": ("gelu_pytorch_tanh",), "temporal_patch_size": (1,)}, where)
    side = settings["image_size"] // settings["patch_size"]
    if settings["num_patches"] > 0:
        side = int(settings["num_patches"] ** 0.5)
    listed = settings["fullatt_block_indexes"]  # "7|15|23", or None where every layer is full
    full = None if listed is None else tuple(map(int, listed.split("|")))
    return Siglip2NaViT(
        table_side=side if settings["preserve_original_pe"] else None,
        patch_size=settings["patch_size"],
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        mlp_dim=settings["intermediate_size"],
        hidden_stride=settings["hidden_stride"],
        channels=settings["num_channels"],
        window_size=None if full is None else settings["window_size"],
        full_layers=full,
        use_rope=settings["use_rope"],
        norm_epsilon=settings["layer_norm_eps"],
        **fields,
    )


def _aimv2_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image_size": (settings["image_size"], settings["image_size"]),
        "patch_size": settings["patch_size"],
        "width": settings["hidden_size"],
        "depth": settings["num_hidden_layers"],
        "num_heads": settings["num_attention_heads"],
        "mlp_dim": settings["intermediate_size"],
        "norm_epsilon": settings["rms_norm_eps"],
    }


def _of_images(
    module: AIMv2,
    settings: Mapping[str, Any],
    checkpoint: Mapping[str, SourceTensor],
    rules: tuple[Rule, ...],
    ending: str,
    *unused: str,
) -> Description:
    """The tower under the prefix of the key that ends so; all else, and what is unused, is carried along."""
    prefix = find_prefix(checkpoint, ending)
    pixels = jax.ShapeDtypeStruct((1, *module.image_size, settings["num_channels"]), jnp.float32)
    return Description(module, (pixels,), prefixed(rules, source=prefix), beside(prefix, *unused))

"""Qwen2-VL and Qwen2.5-VL: the vision tower and its merger, with or without the language model."""

from collections.abc import Mapping

import jax
import numpy as np

from vlm_jax.checkpoints.maps.qwen_vit import encoder_rules, merger_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.connectors.concat import Concat
from vlm_jax.encoders.qwen_vit import QwenViT
from vlm_jax.pretrained.composition import text_names, text_section, visual_half, with_language
from vlm_jax.pretrained.family import (
    REQUIRED,
    Description,
    PretrainedError,
    beside,
    check_supported,
    find_prefix,
    with_defaults,
)
from vlm_jax.processors.patches import pack_patches
from vlm_jax.types import Config, Dtype, Fields, PackedPatches

# transformers, models/qwen2_vl/configuration_qwen2_vl.py, Qwen2VLVisionConfig; the width of the tower and
# that of the merger's output have class defaults for only one size of the release, so a config must have them.
_COMMON: Fields = {
    "depth": 32,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "rope_parameters": None,
}
QWEN2_DEFAULTS: Fields = {
    **_COMMON,
    "embed_dim": 1280,
    "hidden_size": REQUIRED,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
}
# The same of models/qwen2_5_vl, Qwen2_5_VLVisionConfig.
QWEN2_5_DEFAULTS: Fields = {
    **_COMMON,
    "hidden_size": REQUIRED,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "window_size": 112,
    "out_hidden_size": REQUIRED,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def qwen2_visual(config: Config, where: str, **dtypes: Dtype) -> tuple[QwenViT, Concat]:
    """Tower and merger of a `Qwen2VLVisionConfig`: LayerNorm, quick GELU, full attention in every layer.

    Args:
      config: the released section.
      where: name of the section for errors.
      **dtypes: `dtype` and `param_dtype`.

    Raises:
      PretrainedError: missing or unsupported settings.
    """
    settings = with_defaults(config, QWEN2_DEFAULTS, where)
    encoder = QwenViT(
        width=settings["embed_dim"],
        mlp_dim=int(settings["embed_dim"] * settings["mlp_ratio"]),
        gated=False,
        norm="layer",
        **_common_fields(settings, where),
        **dtypes,
    )
    return encoder, Concat(settings["hidden_size"], encoder.merge_size, norm="layer", **dtypes)


def qwen2_5_visual(config: Config, where: str, **dtypes: Dtype) -> tuple[QwenViT, Concat]:
    """Tower and merger of a `Qwen2_5_VLVisionConfig`: RMSNorm, SwiGLU, windows outside the listed layers.

    Args:
      config: the released section.
      where: name of the section for errors.
      **dtypes: `dtype` and `param_dtype`.

    Raises:
      PretrainedError: missing or unsupported settings.
    """
    settings = with_defaults(config, QWEN2_5_DEFAULTS, where)
    encoder = QwenViT(
        width=settings["hidden_size"],
        mlp_dim=settings["intermediate_size"],
        gated=True,
        norm="rms",
        window_size=settings["window_size"],
        # An index beyond the last layer is ignored, as in the release.
        full_layers=tuple(i for i in settings["fullatt_block_indexes"] if i < settings["depth"]),
        **_common_fields(settings, where),
        **dtypes,
    )
    return encoder, Concat(settings["out_hidden_size"], encoder.merge_size, norm="rms", **dtypes)


def _common_fields(settings: Config, where: str) -> Fields:
    rope = {"rope_type": "axial", "rope_theta": 10_000.0, **(settings["rope_parameters"] or {})}
    check_supported(settings, {"hidden_act": ("quick_gelu", "silu", "gelu")}, where)
    check_supported(rope, {"rope_type": ("axial", "default")}, f"{where}.rope_parameters")
    for key in ("patch_size", "temporal_patch_size"):
        if not isinstance(settings[key], int):
            raise PretrainedError(f"{where}.{key}: expected one integer, got {settings[key]!r}")
    return {
        "patch_size": settings["patch_size"],
        "temporal_patch_size": settings["temporal_patch_size"],
        "merge_size": settings["spatial_merge_size"],
        "depth": settings["depth"],
        "num_heads": settings["num_heads"],
        "activation": settings["hidden_act"],
        "rope_theta": float(rope["rope_theta"]),
        # The key in the first releases is in_chans.
        "channels": settings.get("in_channels", settings.get("in_chans", 3)),
    }


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """The full system, or its tower and merger if the checkpoint has only these.

    The settings of the language model are in `text_config`, or in released files at the top level. The
    tower's names start with `visual.` in released files, with `model.visual.` in those of some versions
    of transformers, and have no prefix in a tower's own file.
    """
    kind = config["model_type"]
    visual = qwen2_5_visual if kind.startswith("qwen2_5_vl") else qwen2_visual
    where = f"{kind}.vision_config" if "vision_config" in config else kind
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    encoder, connector = visual(config.get("vision_config", config), where, **dtypes)
    window = (encoder.channels, encoder.temporal_patch_size, encoder.patch_size, encoder.patch_size)
    prefix = find_prefix(checkpoint, "patch_embed.proj.weight")
    rules = (
        *prefixed(encoder_rules(width=encoder.width, window=window, gated=encoder.gated), prefix, "encoder/"),
        *prefixed(merger_rules(gated=encoder.gated), prefix, "connector/"),
    )
    inputs = packed_shapes(encoder.patch_dim, encoder.merge_size, encoder.window)
    system = "qwen2_5_vl" if kind.startswith("qwen2_5_vl") else "qwen2_vl"
    nested = config if config.get("text_config") else {"text_config": config, **config}
    text = {**text_section(nested, checkpoint, kind="", tied=False), "model_type": f"{system}_text"}
    return with_language(
        visual_half(encoder, connector, inputs, rules),
        text,
        checkpoint,
        f"{kind}.text_config" if config.get("text_config") else kind,
        names=text_names(checkpoint),
        beside=beside(prefix),
        **dtypes,
    )


def packed_shapes(patch_dim: int, merge_size: int, window: int | None, *, class_tokens: bool = False) -> PackedPatches:
    """Shapes of the smallest image that can be packed for an encoder."""
    patches = np.zeros((merge_size**2, patch_dim), np.float32)
    grid = (1, merge_size, merge_size)
    packed = pack_patches(patches, [grid], merge_size=merge_size, window=window, class_tokens=class_tokens)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), packed)

"""Qwen-VL (v1): its ViT, its resampler and Qwen."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.checkpoints.maps.qwen_vl import encoder_rules, projection_rules, resampler_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.connectors.resampler import Resampler
from vlm_jax.encoders.vit import ViT
from vlm_jax.pretrained.composition import visual_half, with_language
from vlm_jax.pretrained.family import REQUIRED, Description, Names, square_root, with_defaults
from vlm_jax.pretrained.language import describe_qwen
from vlm_jax.pretrained.tables import image_shape
from vlm_jax.types import Config, Dtype, Fields

# Qwen/Qwen-VL-Chat, visual.py, VisionTransformer.
DEFAULTS: Fields = {
    "patch_size": REQUIRED,
    "width": REQUIRED,
    "layers": REQUIRED,
    "heads": REQUIRED,
    "mlp_ratio": REQUIRED,
    "n_queries": 256,
    "output_dim": 512,
}
PREFIX = "transformer.visual."
BESIDE = (r"(?!transformer\.visual\.).*",)
_TABLE_ROWS = 256  # independent of image_size
_HEAD_DIM = 128  # of the resampler


def encoder(settings: Config, table_rows: int, **fields: Any) -> ViT:
    """The ViT of a `visual` section with its defaults."""
    side = settings["patch_size"] * square_root(table_rows, f"{PREFIX}positional_embedding")
    return ViT(
        image_size=(side, side),
        patch_size=settings["patch_size"],
        patch_bias=False,
        width=settings["width"],
        depth=settings["layers"],
        num_heads=settings["heads"],
        mlp_dim=int(settings["width"] * settings["mlp_ratio"]),
        activation="gelu",
        pre_norm=True,
        final_norm="none",
        position_interpolation="bicubic",
        **fields,
    )


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """The full system, or its ViT and resampler, or its language model if the checkpoint has only these."""
    if "visual" not in config:
        return describe_qwen(config, checkpoint, dtype=dtype, param_dtype=param_dtype)
    settings, dtypes = (
        with_defaults(config["visual"], DEFAULTS, "visual"),
        {"dtype": dtype, "param_dtype": param_dtype},
    )
    table = checkpoint.get(f"{PREFIX}positional_embedding")
    vit = encoder(settings, _TABLE_ROWS if table is None else table.shape[0], **dtypes)
    width = settings["output_dim"]
    connector = Resampler(
        features=width,
        num_queries=settings["n_queries"],
        num_heads=width // _HEAD_DIM,
        released=True,
        **dtypes,
    )
    rules = (
        *prefixed(encoder_rules(vit.width, vit.num_heads), PREFIX, "encoder/"),
        *prefixed(resampler_rules(width), f"{PREFIX}attn_pool.", "connector/"),
        *prefixed(projection_rules(), PREFIX, "connector/"),
    )
    visual = visual_half(vit, connector, image_shape(vit, 3), rules)
    return with_language(visual, config, checkpoint, "qwen", names=Names("transformer."), beside=BESIDE, **dtypes)

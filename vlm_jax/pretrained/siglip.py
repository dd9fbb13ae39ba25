"""SigLIP and SigLIP 2 of transformers: both towers, or one.

SigLIP 2 at a fixed resolution is released as `siglip`; `siglip2` is NaFlex.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.maps import clip as maps
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.decoders.text_tower import TextTower
from vlm_jax.encoders.naflex import NaflexViT
from vlm_jax.encoders.trunk import Pooling
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.pretrained.clip import IGNORE, TEXT_SHAPE
from vlm_jax.pretrained.family import Description, find_prefix, one_side, square_root, with_defaults
from vlm_jax.pretrained.hugging_face import block_fields, vit_fields
from vlm_jax.pretrained.tables import image_shape, resizer
from vlm_jax.types import Config, Dtype, Fields, PackedPatches, Tree

# transformers, models/siglip/configuration_siglip.py and models/siglip2/configuration_siglip2.py.
_COMMON: Fields = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_VISION: Fields = {**_COMMON, "num_channels": 3, "patch_size": 16, "vision_use_head": True}
VISION_DEFAULTS: Fields = {**_VISION, "image_size": 224}
NAFLEX_DEFAULTS: Fields = {**_VISION, "num_patches": 256}
TEXT_DEFAULTS: Fields = {
    **_COMMON,
    "vocab_size": 32000,
    "max_position_embeddings": 64,
    "projection_size": None,
}
# models/siglip/modeling_siglip.py initialises both randomly; these are the initial values of the paper.
_LOG_SCALE, _BIAS = 2.302585092994046, -10.0


def vision_tower(config: Config, where: str, **fields: Any) -> ViT:
    """The ViT of a `SiglipVisionConfig`.

    Args:
      config: the released section.
      where: name of the section for errors.
      **fields: more fields of `ViT`, or other values.
    """
    settings = with_defaults(config, VISION_DEFAULTS, where)
    return ViT(**{**vit_fields(settings, where), "pooling": _pooling(settings), **fields})


def naflex_tower(config: Config, where: str, **fields: Any) -> NaflexViT:
    """The NaFlex ViT of a `Siglip2VisionConfig`; arguments as in `vision_tower`."""
    settings = with_defaults(config, NAFLEX_DEFAULTS, where)
    side = square_root(settings["num_patches"], f"{where}.num_patches")
    own = {
        **block_fields(settings, where),
        "patch_size": one_side(settings["patch_size"], f"{where}.patch_size"),
        "table_grid": (side, side),
        "pooling": _pooling(settings),
    }
    return NaflexViT(**{**own, **fields})


def _pooling(settings: Config) -> Pooling:
    return "map" if settings["vision_use_head"] else "none"


def text_tower(config: Config, where: str, **fields: Any) -> TextTower:
    """The text tower of a `SiglipTextConfig` or `Siglip2TextConfig`; arguments as in `vision_tower`."""
    settings = with_defaults(config, TEXT_DEFAULTS, where)
    own = {
        **block_fields(settings, where),
        "vocab_size": settings["vocab_size"],
        "context_length": settings["max_position_embeddings"],
        "causal": False,
        "pooling": "last",
        "projection_dim": settings["projection_size"] or settings["hidden_size"],
    }
    return TextTower(**{**own, **fields})


def _vision(config: Config, where: str, naflex: bool, dtypes: Config) -> tuple[ViT | NaflexViT, tuple[Rule, ...], Tree]:
    """The image tower, its rules and the shape of an input."""
    if naflex:
        channels = with_defaults(config, NAFLEX_DEFAULTS, where)["num_channels"]
        tower = naflex_tower(config, where, **dtypes)
        return tower, maps.siglip2_vision_rules(tower.width), patches_shape(tower, channels)
    channels = with_defaults(config, VISION_DEFAULTS, where)["num_channels"]
    tower = vision_tower(config, where, **dtypes)
    return tower, maps.siglip_vision_rules(tower.width), image_shape(tower, channels)


def patches_shape(tower: NaflexViT, channels: int) -> PackedPatches:
    """Shapes of one image of one patch."""
    pairs = jax.ShapeDtypeStruct((1, 1, 2), jnp.int32)
    patches = jax.ShapeDtypeStruct((1, 1, tower.patch_size**2 * channels), jnp.float32)
    return PackedPatches(patches, pairs, pairs, jax.ShapeDtypeStruct((1, 1), jnp.int32))


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `SiglipModel` or `Siglip2Model`."""
    del checkpoint
    kind, dtypes = config["model_type"], {"dtype": dtype, "param_dtype": param_dtype}
    naflex = kind == "siglip2"
    section = config.get("vision_config") or {}
    vision, vision_rules, image = _vision(section, f"{kind}.vision_config", naflex, dtypes)
    text = text_tower(config.get("text_config") or {}, f"{kind}.text_config", **dtypes)
    resize = None
    if isinstance(vision, ViT):
        resize = resizer(config, vision, path=("image",), size_key=("vision_config", "image_size"))
    return Description(
        TwoTower(vision, text, _LOG_SCALE, _BIAS),
        (image, TEXT_SHAPE),
        (
            *prefixed(vision_rules, "vision_model.", "image/"),
            *prefixed(maps.siglip_text_rules(), "text_model.", "text/"),
            *maps.siglip_rules(),
        ),
        IGNORE,
        resize,
    )


def describe_vision(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `SiglipVisionModel` or `Siglip2VisionModel`."""
    kind = config["model_type"]
    naflex = kind == "siglip2_vision_model"
    vision, rules, image = _vision(config, kind, naflex, {"dtype": dtype, "param_dtype": param_dtype})
    prefix = find_prefix(checkpoint, "embeddings.patch_embedding.weight")
    resize = resizer(config, vision, size_key=("image_size",)) if isinstance(vision, ViT) else None
    return Description(vision, (image,), prefixed(rules, prefix), IGNORE, resize)


def describe_text(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `SiglipTextModel` or `Siglip2TextModel`."""
    text = text_tower(config, config["model_type"], dtype=dtype, param_dtype=param_dtype)
    prefix = find_prefix(checkpoint, "embeddings.token_embedding.weight")
    return Description(text, (TEXT_SHAPE,), prefixed(maps.siglip_text_rules(), prefix), IGNORE)

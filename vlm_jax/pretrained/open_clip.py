"""CLIP in the format of openai/CLIP with configs of open_clip: ViT or ModifiedResNet, and text tower."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.maps import open_clip as maps
from vlm_jax.checkpoints.rules import SourceTensor
from vlm_jax.decoders.text_tower import TextTower
from vlm_jax.encoders.resnet import ModifiedResNet
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.pretrained.clip import TEXT_SHAPE
from vlm_jax.pretrained.family import (
    REQUIRED,
    Description,
    PretrainedError,
    Resize,
    check_supported,
    one_side,
    with_defaults,
)
from vlm_jax.pretrained.tables import image_shape, resizer
from vlm_jax.types import Config, Dtype, Fields, Params

# open_clip, src/open_clip/model.py, CLIPVisionCfg, CLIPTextCfg and CLIP.
VISION_DEFAULTS: Fields = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
}
TEXT_DEFAULTS: Fields = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
}
DEFAULTS: Fields = {
    "embed_dim": REQUIRED,
    "vision_cfg": REQUIRED,
    "text_cfg": REQUIRED,
    "quick_gelu": False,
}
_LOG_SCALE = math.log(1 / 0.07)
_NORM_EPSILON = 1e-5
# Counters of training, and the sizes that OpenAI's files store as tensors.
IGNORE = (r".*\.num_batches_tracked", r"input_resolution|context_length|vocab_size")


def _section(config: Config, defaults: Config, where: str) -> Fields:
    """The section with its defaults.

    Raises:
      PretrainedError: unknown keys with a true value, which would change the computation; lists all.
    """
    neutral = {"pool_type": ("tok", "argmax"), "proj_type": ("linear",)}
    config = {key: value for key, value in config.items() if key != "patch_size" or value is not None}  # of a ResNet
    check_supported(config, neutral, where)
    unknown = [key for key, value in config.items() if value and key not in defaults and key not in neutral]
    if unknown:
        raise PretrainedError("\n".join(f"{where}.{key}: {config[key]!r} is not supported" for key in unknown))
    return with_defaults(config, defaults, where)


def _image_tower(settings: Config, **fields: Any) -> ViT | ModifiedResNet:
    width, side = settings["width"], one_side(settings["image_size"], "vision_cfg.image_size")
    activation = fields.pop("activation")
    if not isinstance(settings["layers"], int):
        return ModifiedResNet(
            image_size=(side, side),
            layers=tuple(settings["layers"]),
            base_width=width,
            num_heads=width * 32 // settings["head_width"],
            **fields,
        )
    return ViT(
        image_size=(side, side),
        patch_size=one_side(settings["patch_size"], "vision_cfg.patch_size"),
        patch_bias=False,
        width=width,
        depth=settings["layers"],
        num_heads=width // settings["head_width"],
        mlp_dim=int(width * settings["mlp_ratio"]),
        activation=activation,
        norm_epsilon=_NORM_EPSILON,
        class_token=True,
        class_position=True,
        pre_norm=True,
        pooling="token",
        **fields,
    )


def _with_pictures(resize: Resize) -> Resize:
    """Also sets the image size of the preprocessing in the config, if it has one."""

    def apply(params: Params, side: int) -> tuple[Fields, Params, dict[str, SourceTensor]]:
        config, params, shapes = resize(params, side)
        pictures = config.get("preprocess_cfg") or {}
        if pictures.get("size") is not None:
            config = {**config, "preprocess_cfg": {**pictures, "size": side}}
        return config, params, shapes

    return apply


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """The full model; the config is a file of open_clip's `model_configs`, or wrapped as `model_cfg`."""
    del checkpoint
    wrapped = "model_cfg" in config
    settings = _section(config["model_cfg"] if wrapped else config, DEFAULTS, "model_cfg")
    vision = _section(settings["vision_cfg"], VISION_DEFAULTS, "vision_cfg")
    section = _section(settings["text_cfg"], TEXT_DEFAULTS, "text_cfg")
    fields = {
        "activation": "quick_gelu" if settings["quick_gelu"] else "gelu",
        "projection_dim": settings["embed_dim"],
        "dtype": dtype,
        "param_dtype": param_dtype,
    }
    image = _image_tower(vision, **fields)
    text = TextTower(
        vocab_size=section["vocab_size"],
        context_length=section["context_length"],
        width=section["width"],
        depth=section["layers"],
        num_heads=section["heads"],
        mlp_dim=int(section["width"] * section["mlp_ratio"]),
        norm_epsilon=_NORM_EPSILON,
        causal=True,
        pooling="highest",
        projection_bias=False,
        **fields,
    )
    if isinstance(image, ViT):
        rows = image.grid(*image.image_size)[0] if image.image_size else 0
        rules, shape = maps.vit_rules(image.width, rows * rows), image_shape(image, 3)
        keys = (*(("model_cfg",) if wrapped else ()), "vision_cfg", "image_size")
        resize = _with_pictures(resizer(config, image, path=("image",), size_key=keys))
    else:
        rules, resize = maps.resnet_rules(), None
        shape = jax.ShapeDtypeStruct((1, *image.image_size, 3), jnp.float32)
    return Description(
        TwoTower(image, text, _LOG_SCALE),
        (shape, TEXT_SHAPE),
        maps.clip_rules(rules, text.width),
        IGNORE,
        resize,
    )

"""big_vision's ViT, text tower and two-tower models."""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.checkpoints.maps import big_vision as maps
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.decoders.text_tower import TextPooling, TextTower
from vlm_jax.encoders.naflex import NaflexViT
from vlm_jax.encoders.trunk import Pooling
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.classifier import Classifier
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.pretrained.clip import TEXT_SHAPE
from vlm_jax.pretrained.family import (
    REQUIRED,
    Description,
    PretrainedError,
    check_supported,
    one_side,
    square_root,
    with_defaults,
)
from vlm_jax.pretrained.siglip import patches_shape
from vlm_jax.pretrained.tables import image_shape, resizer
from vlm_jax.types import Config, Dtype, Fields

# big_vision, models/vit.py (defaults of `_Model`, and `decode_variant`).
VIT_DEFAULTS: Fields = {
    "patch_size": (16, 16),
    "width": 768,
    "depth": 12,
    "mlp_dim": None,
    "num_heads": 12,
    "posemb": "learn",
    "rep_size": False,
    "pool_type": "gap",
    "scan": False,
}
VARIANTS: dict[str, tuple[int, int, int, int]] = {  # width, depth, mlp_dim, num_heads
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}
# models/proj/image_text/text_transformer.py, naflex_vit.py and two_towers.py.
TEXT_DEFAULTS: Fields = {
    "width": 512,
    "depth": 12,
    "mlp_dim": 2048,
    "num_heads": 8,
    "vocab_size": 32_000,
    "pool_type": "last",
    "scan": False,
}
NAFLEX_DEFAULTS: Fields = {**VIT_DEFAULTS, "posemb": "learn_2d(64)", "nposemb": REQUIRED}
TWO_TOWER_DEFAULTS: Fields = {
    "text_model": "proj.image_text.text_transformer",
    "image_model": "vit",
    "out_dim": 128,
    "temperature_init": 1.0,
    "bias_init": None,
}
_POOLING: dict[str, Pooling] = {
    "gap": "gap",
    "map": "map",
    "tok": "token",
    "0": "token",
    "max": "max",
    "none": "none",
}
_TEXT_POOLING: dict[str, TextPooling] = {
    "last": "last",
    "first": "first",
    "mean": "mean",
    "gap": "mean",
    "max": "max",
    "gmp": "max",
    "map": "map",
}
_NAFLEX = "proj.image_text.naflex_vit"


def tower_settings(config: Config, defaults: Config, where: str) -> Fields:
    """The section with its variant expanded and its defaults."""
    variant = config.get("variant")
    sizes: Fields = {}
    if variant is not None:
        name, _, patch = variant.partition("/")
        if name not in VARIANTS:
            raise PretrainedError(f"{where}.variant: unknown '{name}'; expected one of {', '.join(VARIANTS)}")
        sizes = dict(zip(("width", "depth", "mlp_dim", "num_heads"), VARIANTS[name], strict=True))
        sizes |= {"patch_size": int(patch)} if patch else {}
    settings = with_defaults({**sizes, **config}, defaults, where)
    return {**settings, "mlp_dim": settings["mlp_dim"] or 4 * settings["width"]}


def _trunk_fields(settings: Config, where: str) -> Fields:
    check_supported(settings, {"pool_type": tuple(_POOLING)}, where)
    representation = settings["rep_size"]
    return {
        "width": settings["width"],
        "depth": settings["depth"],
        "mlp_dim": settings["mlp_dim"],
        "num_heads": settings["num_heads"],
        "pooling": _POOLING[settings["pool_type"]],
        "representation_size": settings["width"] if representation is True else representation or None,
    }


def vision_tower(
    config: Config, checkpoint: Mapping[str, SourceTensor], prefix: str, where: str, **fields: Any
) -> tuple[ViT, tuple[Rule, ...]]:
    """A ViT; the image size of training is computed from its position table."""
    settings = tower_settings(config, VIT_DEFAULTS, where)
    check_supported(settings, {"posemb": ("learn", "sincos2d")}, where)
    patch = one_side(settings["patch_size"], f"{where}.patch_size")
    table = checkpoint.get(f"{prefix}pos_embedding")
    rows = 0 if table is None else table.shape[1]
    side = patch * square_root(rows, f"{prefix}pos_embedding")
    vit = ViT(
        image_size=(side, side) if side else None,
        patch_size=patch,
        position="learned" if settings["posemb"] == "learn" else "sincos",
        position_interpolation="corner_linear",
        class_token=settings["pool_type"] == "tok",
        **_trunk_fields(settings, where),
        **fields,
    )
    sizes = maps.Sizes(vit.width, vit.num_heads)
    return vit, maps.vit_rules(sizes, rows, scanned=settings["scan"])


def _size_keys(vit: ViT, table_key: str) -> Fields:
    """The source of the image size: the position table, or `image_size` next to `model` where there is none."""
    return {"size_key": ("image_size",)} if vit.image_size is None else {"table_key": table_key}


def _naflex(
    config: Config, checkpoint: Mapping[str, SourceTensor], prefix: str, where: str, **fields: Any
) -> tuple[NaflexViT, tuple[Rule, ...]]:
    """A NaFlex ViT, whose patch size is not in its config."""
    settings = tower_settings(config, NAFLEX_DEFAULTS, where)
    grid = settings["nposemb"]
    if not settings["posemb"].startswith("learn_2d"):
        raise PretrainedError(f"{where}.posemb: expected 'learn_2d' or 'learn_2d(..)', got {settings['posemb']!r}")
    check_supported(settings, {"patchln_pre": (False,), "patchln_post": (False,)}, where)
    kernel = checkpoint.get(f"{prefix}embedding/kernel")
    pixels = 1 if kernel is None else kernel.shape[0] // 3
    patch = square_root(pixels, f"{prefix}embedding/kernel, its rows by colour")
    vit = NaflexViT(patch_size=patch, table_grid=(grid, grid), **_trunk_fields(settings, where), **fields)
    return vit, maps.naflex_rules(maps.Sizes(vit.width, vit.num_heads), grid, scanned=settings["scan"])


def _text(
    config: Config,
    checkpoint: Mapping[str, SourceTensor],
    prefix: str,
    where: str,
    out_dim: int | None,
    dtypes: Config,
) -> tuple[TextTower, tuple[Rule, ...]]:
    """A text tower; its context length is computed from its position table."""
    settings = tower_settings(config, TEXT_DEFAULTS, where)
    check_supported(settings, {"pool_type": tuple(_TEXT_POOLING)}, where)
    table = checkpoint.get(f"{prefix}pos_embedding")
    length = 1 if table is None else table.shape[1]
    text = TextTower(
        vocab_size=settings["vocab_size"],
        context_length=length,
        width=settings["width"],
        depth=settings["depth"],
        num_heads=settings["num_heads"],
        mlp_dim=settings["mlp_dim"],
        causal=False,
        pooling=_TEXT_POOLING[settings["pool_type"]],
        projection_dim=out_dim or None,
        **dtypes,
    )
    return text, maps.text_rules(maps.Sizes(text.width, text.num_heads), length, scanned=settings["scan"])


def names_prefix(checkpoint: Mapping[str, SourceTensor]) -> str:
    """`params/` in current releases, empty in older ones."""
    return "params/" if any(key.startswith("params/") for key in checkpoint) else ""


def describe_vit(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A ViT with its classification head, or without where `num_classes` is None or 0."""
    prefix, dtypes = names_prefix(checkpoint), {"dtype": dtype, "param_dtype": param_dtype}
    vit, rules = vision_tower(config.get("model", {}), checkpoint, prefix, "model", **dtypes)
    classes = config.get("num_classes")
    keys = _size_keys(vit, f"{prefix}pos_embedding")
    if not classes:
        resize = resizer(config, vit, **keys)
        return Description(vit, (image_shape(vit, 3),), prefixed(rules, prefix), resize=resize)
    return Description(
        Classifier(vit, classes),
        (image_shape(vit, 3),),
        (*prefixed(rules, prefix, "encoder/"), *prefixed(maps.dense("head", "head"), prefix)),
        resize=resizer(config, vit, path=("encoder",), **keys),
    )


def describe_text(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """Only a text tower."""
    prefix, dtypes = names_prefix(checkpoint), {"dtype": dtype, "param_dtype": param_dtype}
    text, rules = _text(config.get("model", {}), checkpoint, prefix, "model", config.get("num_classes"), dtypes)
    return Description(text, (TEXT_SHAPE,), prefixed(rules, prefix))


def describe_two_towers(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """Both towers; the image tower is a ViT or a NaFlex ViT."""
    settings = with_defaults(config.get("model", {}), TWO_TOWER_DEFAULTS, "model")
    known = {"text_model": (TWO_TOWER_DEFAULTS["text_model"],), "image_model": ("vit", _NAFLEX)}
    check_supported(settings, known, "model")
    prefix, dtypes = names_prefix(checkpoint), {"dtype": dtype, "param_dtype": param_dtype}
    widths = settings["out_dim"]
    image_dim, text_dim = (widths, widths) if isinstance(widths, int) else widths
    fields = {"projection_dim": image_dim, "projection_bias": True, **dtypes}
    section, resize = settings.get("image", {}), None
    if settings["image_model"] == _NAFLEX:
        image, rules = _naflex(section, checkpoint, f"{prefix}img/", "model.image", **fields)
        image_input = patches_shape(image, 3)
    else:
        image, rules = vision_tower(section, checkpoint, f"{prefix}img/", "model.image", **fields)
        image_input = image_shape(image, 3)
        resize = resizer(config, image, path=("image",), **_size_keys(image, f"{prefix}img/pos_embedding"))
    text, text_rules = _text(settings.get("text", {}), checkpoint, f"{prefix}txt/", "model.text", text_dim, dtypes)
    log_scale = math.log(settings["temperature_init"])
    return Description(
        TwoTower(image, text, log_scale, None if settings["bias_init"] is None else float(settings["bias_init"])),
        (image_input, TEXT_SHAPE),
        (
            *prefixed((*rules, *maps.dense("head", "projection")), f"{prefix}img/", "image/"),
            *prefixed(text_rules, f"{prefix}txt/", "text/"),
            *prefixed(maps.two_tower_rules(), prefix),
        ),
        resize=resize,
    )

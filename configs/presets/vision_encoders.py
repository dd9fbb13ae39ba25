"""Released image towers at their real sizes: the encoder, and what the processor does to its pixels.

A runnable config takes one with `system.take(config, clip_vit_l14_336())`. Which hidden state feeds the
connector is the system's choice: `config.encoder.select_layer = -2` with `pooling = "none"` is LLaVA's.
"""

from typing import Any

from ml_collections import ConfigDict

_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def _preset(side: int | None, mean: tuple, std: tuple, filter: str, **encoder: Any) -> ConfigDict:
    size = None if side is None else (side, side)
    pixels = {"image_size": size, "mean": mean, "std": std, "filter": filter}
    return ConfigDict({"encoder": {"kind": "vit", **encoder}, "processor": pixels})


_BASE = {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072}
_LARGE = {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096}
_SO400M = {"width": 1152, "depth": 27, "num_heads": 16, "mlp_dim": 4304}


def _vit(side: int, patch_size: int, sizes: dict[str, int]) -> ConfigDict:
    token = {"class_token": True, "class_position": True, "pooling": "token"}
    more = {**token, "position_interpolation": "corner_linear"}
    return _preset(side, _HALF, _HALF, "bilinear", patch_size=patch_size, **sizes, **more)


def vit_b16_224() -> ConfigDict:
    """ViT-B/16 of vision_transformer, with its class token and without a head."""
    return _vit(224, 16, _BASE)


def vit_l16_224() -> ConfigDict:
    """ViT-L/16 of vision_transformer, with its class token and without a head."""
    return _vit(224, 16, _LARGE)


def _clip(side: int, patch_size: int, sizes: dict[str, int]) -> ConfigDict:
    return _preset(
        side,
        _CLIP_MEAN,
        _CLIP_STD,
        "bicubic",
        patch_size=patch_size,
        **sizes,
        activation="quick_gelu",
        norm_epsilon=1e-5,
        patch_bias=False,
        class_token=True,
        class_position=True,
        pre_norm=True,
        final_norm="pooled",
        pooling="token",
        position_interpolation="bicubic",
    )


def clip_vit_b32_224() -> ConfigDict:
    """CLIP ViT-B/32, without its projection."""
    return _clip(224, 32, _BASE)


def clip_vit_b16_224() -> ConfigDict:
    """CLIP ViT-B/16, without its projection."""
    return _clip(224, 16, _BASE)


def clip_vit_l14_224() -> ConfigDict:
    """CLIP ViT-L/14, without its projection."""
    return _clip(224, 14, _LARGE)


def clip_vit_l14_336() -> ConfigDict:
    """CLIP ViT-L/14 at 336 pixels, without its projection."""
    return _clip(336, 14, _LARGE)


def _siglip(side: int, patch_size: int, sizes: dict[str, int], filter: str = "bicubic") -> ConfigDict:
    more = {"pooling": "map", "position_interpolation": "bicubic"}
    return _preset(side, _HALF, _HALF, filter, patch_size=patch_size, **sizes, **more)


def siglip_b16_224() -> ConfigDict:
    """SigLIP B/16, with its attention-pooling head."""
    return _siglip(224, 16, _BASE)


def siglip_l16_384() -> ConfigDict:
    """SigLIP L/16 at 384 pixels, with its attention-pooling head."""
    return _siglip(384, 16, _LARGE)


def siglip_so400m_14_384() -> ConfigDict:
    """SigLIP so400m/14 at 384 pixels, with its attention-pooling head."""
    return _siglip(384, 14, _SO400M)


def siglip2_so400m_14_384() -> ConfigDict:
    """SigLIP 2 so400m/14 at 384 pixels, with its attention-pooling head."""
    return _siglip(384, 14, _SO400M, "bilinear")


def siglip2_g_opt_16_384() -> ConfigDict:
    """SigLIP 2 g-opt/16 at 384 pixels, with its attention-pooling head."""
    return _siglip(384, 16, {"width": 1536, "depth": 40, "num_heads": 16, "mlp_dim": 6144}, "bilinear")


def internvit_300m_448() -> ConfigDict:
    """InternViT-300M at 448 pixels, whose class token the features leave out."""
    return _preset(
        448,
        _IMAGENET_MEAN,
        _IMAGENET_STD,
        "bicubic",
        patch_size=14,
        **_LARGE,
        activation="gelu",
        class_token=True,
        class_position=True,
        layer_scale=0.1,
        final_norm="none",
        position_interpolation="bicubic",
    )


def qwen_vl_bigg_448() -> ConfigDict:
    """The tower of Qwen-VL, OpenCLIP's ViT-bigG/14 without its head: a table for 224 pixels, images of 448."""
    return _preset(
        448,
        _CLIP_MEAN,
        _CLIP_STD,
        "bicubic",
        image_size=(224, 224),
        patch_size=14,
        width=1664,
        depth=48,
        num_heads=16,
        mlp_dim=8192,
        activation="gelu",
        patch_bias=False,
        pre_norm=True,
        final_norm="none",
        position_interpolation="bicubic",
        remat="full",
    )


def _qwen2_vl(**more: Any) -> ConfigDict:
    sizes = {"patch_size": 14, "width": 1280, "depth": 32, "num_heads": 16, "remat": "full"}
    return _preset(None, _CLIP_MEAN, _CLIP_STD, "bicubic", **{"kind": "qwen_vit", **sizes, **more})


def qwen2_vl_675m() -> ConfigDict:
    """The tower of Qwen2-VL, for pictures of any size."""
    return _qwen2_vl(mlp_dim=5120, activation="quick_gelu", gated=False, norm="layer")


def qwen2_5_vl_vit(mlp_dim: int = 3420) -> ConfigDict:
    """The tower of Qwen2.5-VL, for pictures of any size; most blocks attend to windows."""
    return _qwen2_vl(mlp_dim=mlp_dim, window_size=112, full_layers=(7, 15, 23, 31))


def siglip2_navit_so400m_16() -> ConfigDict:
    """The tower of Ovis 2.5, for pictures of any size."""
    more = {"kind": "siglip2_navit", "patch_size": 16, "remat": "full"}
    return _preset(None, _HALF, _HALF, "bicubic", **_SO400M, **more)


def _aimv2(**sizes: int) -> ConfigDict:
    more = {"kind": "aimv2", "patch_size": 14, "depth": 24, "remat": "full"}
    return _preset(448, _CLIP_MEAN, _CLIP_STD, "bicubic", **sizes, **more)


def aimv2_l14_448() -> ConfigDict:
    """AIMv2 L/14 at 448 pixels, without its last norm, as Ovis 2 takes it."""
    return _aimv2(width=1024, num_heads=8, mlp_dim=2816)


def aimv2_h14_448() -> ConfigDict:
    """AIMv2 H/14 at 448 pixels; likewise."""
    return _aimv2(width=1536, num_heads=12, mlp_dim=4096)


def sam_b_siglip_l16_1024() -> ConfigDict:
    """The towers of DeepSeek-VL 7B, on the same image at 1024 and at 384 pixels; each normalises its own."""
    high = {"kind": "sam", "patch_size": 16, "width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072}
    high |= {"neck_dim": 256, "global_blocks": (2, 5, 8, 11), "high_res_branch": True}
    high |= {"downsample_dims": (512, 1024), "downsample_from": (96, 96)}
    low = {"kind": "vit", "image_size": (384, 384), "patch_size": 16, **_LARGE, "activation": "gelu"}
    statistics = {"high_statistics": (_CLIP_MEAN, _CLIP_STD), "low_statistics": (_HALF, _HALF)}
    both = {"kind": "hybrid", "high": high, "low": low, "low_size": 384, "combine": "feature", **statistics}
    return _preset(1024, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", **both)

"""Released image towers at their real sizes: the encoder, and what the processor does to its pixels.

A runnable config takes one with `config.update(clip_vit_l14_336())`. Which hidden state feeds the
connector is the system's choice: `config.encoder.select_layer = -2` with `pooling = "none"` is LLaVA's.
"""

from ml_collections import ConfigDict

_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def _preset(side: int, mean: tuple, std: tuple, filter: str, **encoder) -> ConfigDict:
    pixels = {"image_size": (side, side), "mean": mean, "std": std, "filter": filter}
    return ConfigDict({"encoder": {"kind": "vit", **encoder}, "processor": pixels})


def vit_l16_224() -> ConfigDict:
    """ViT-L/16 of vision_transformer, with its class token and without a head."""
    return _preset(
        224,
        _HALF,
        _HALF,
        "bilinear",
        patch_size=16,
        width=1024,
        depth=24,
        num_heads=16,
        mlp_dim=4096,
        class_token=True,
        class_position=True,
        pooling="token",
        position_interpolation="corner_linear",
    )


def clip_vit_l14_336() -> ConfigDict:
    """CLIP ViT-L/14 at 336 pixels, without its projection."""
    return _preset(
        336,
        _CLIP_MEAN,
        _CLIP_STD,
        "bicubic",
        patch_size=14,
        width=1024,
        depth=24,
        num_heads=16,
        mlp_dim=4096,
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


def siglip_so400m_14_384() -> ConfigDict:
    """SigLIP so400m/14 at 384 pixels, with its attention-pooling head."""
    return _preset(
        384,
        _HALF,
        _HALF,
        "bicubic",
        patch_size=14,
        width=1152,
        depth=27,
        num_heads=16,
        mlp_dim=4304,
        pooling="map",
        position_interpolation="bicubic",
    )


def siglip2_g_opt_16_384() -> ConfigDict:
    """SigLIP 2 g-opt/16 at 384 pixels, with its attention-pooling head."""
    return _preset(
        384,
        _HALF,
        _HALF,
        "bilinear",
        patch_size=16,
        width=1536,
        depth=40,
        num_heads=16,
        mlp_dim=6144,
        pooling="map",
        position_interpolation="bicubic",
    )


def internvit_300m_448() -> ConfigDict:
    """InternViT-300M at 448 pixels, whose class token the features leave out."""
    return _preset(
        448,
        _IMAGENET_MEAN,
        _IMAGENET_STD,
        "bicubic",
        patch_size=14,
        width=1024,
        depth=24,
        num_heads=16,
        mlp_dim=4096,
        activation="gelu",
        class_token=True,
        class_position=True,
        layer_scale=0.1,
        final_norm="none",
        position_interpolation="bicubic",
    )

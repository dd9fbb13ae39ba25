"""Qwen-VL, Qwen2-VL and Qwen2.5-VL."""

from ml_collections import ConfigDict

from configs.presets import language_models, vision_encoders
from configs.presets.system import released

# `bos_token_id` of the released configs is that of <|endoftext|>.
_TOKENS = {"pad": "<|endoftext|>", "bos": "<|endoftext|>", "eos": "<|im_end|>", "image": "<|image_pad|>"}
_MOST, _FEWEST = 16_384, 4  # visual tokens of a picture, by the released max_pixels and min_pixels


def qwen_vl() -> ConfigDict:
    """Qwen-VL and Qwen-VL-Chat: 448 pixels, a table of positions for 224."""
    connector = {"kind": "resampler", "num_heads": 32, "released": True}
    return released(256, vision_encoders.qwen_vl_bigg_448(), connector, language_models.qwen_7b())


def _qwen2_vl(size: str) -> ConfigDict:
    decoder = language_models.qwen2(size, rope=language_models.M_ROPE)
    vision = vision_encoders.qwen2_vl_675m()
    return released(_MOST, vision, {"kind": "concat"}, decoder, _TOKENS, min_tokens=_FEWEST)


def qwen2_vl_2b() -> ConfigDict:
    """Qwen2-VL 2B."""
    return _qwen2_vl("1.5b")


def qwen2_vl_7b() -> ConfigDict:
    """Qwen2-VL 7B."""
    return _qwen2_vl("7b")


def qwen2_vl_72b() -> ConfigDict:
    """Qwen2-VL 72B."""
    return _qwen2_vl("72b")


def _qwen2_5_vl(size: str, mlp_dim: int = 3420) -> ConfigDict:
    decoder = language_models.qwen2(size, rope=language_models.M_ROPE)
    vision = vision_encoders.qwen2_5_vl_vit(mlp_dim)
    return released(_MOST, vision, {"kind": "concat", "norm": "rms"}, decoder, _TOKENS, min_tokens=_FEWEST)


def qwen2_5_vl_3b() -> ConfigDict:
    """Qwen2.5-VL 3B."""
    return _qwen2_5_vl("3b")


def qwen2_5_vl_7b() -> ConfigDict:
    """Qwen2.5-VL 7B."""
    return _qwen2_5_vl("7b")


def qwen2_5_vl_72b() -> ConfigDict:
    """Qwen2.5-VL 72B, whose tower is a little wider inside."""
    return _qwen2_5_vl("72b", mlp_dim=3456)

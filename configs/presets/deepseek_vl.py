"""DeepSeek-VL 1.3B and 7B, and DeepSeek-VL2 tiny, small and base."""

from ml_collections import ConfigDict

from configs.presets import language_models, vision_encoders
from configs.presets.system import released

_TOKENS = {"pad": "<｜▁pad▁｜>", "bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>"}
# Its SigLIP is timm's, which interpolates positions with antialias.
_WITHOUT_HEAD = {"pooling": "none", "position_interpolation": "bicubic_antialias", "remat": "full"}


def deepseek_vl_1_3b() -> ConfigDict:
    """DeepSeek-VL 1.3B: SigLIP alone."""
    vision, tokens = vision_encoders.siglip_l16_384(), {**_TOKENS, "image": "<image_placeholder>"}
    vision.encoder.update({**_WITHOUT_HEAD, "activation": "gelu"})
    return released(576, vision, {"kind": "mlp"}, language_models.deepseek_1_3b(), tokens)


def deepseek_vl_7b() -> ConfigDict:
    """DeepSeek-VL 7B: SAM at 1024 pixels beside SigLIP."""
    tokens = {**_TOKENS, "image": "<image_placeholder>"}
    vision = vision_encoders.sam_b_siglip_l16_1024()
    return released(576, vision, {"kind": "hybrid_mlp"}, language_models.deepseek_7b(), tokens)


def _deepseek_vl2(decoder: dict) -> ConfigDict:
    """Its tiles are `config.processor.tiles`; newline and separator are not laid out."""
    vision, tokens = vision_encoders.siglip_so400m_14_384(), {**_TOKENS, "image": "<image>"}
    vision.encoder.update(_WITHOUT_HEAD)
    connector = {"kind": "pixel_shuffle", "norm": None, "mlp_dim": decoder["width"]}
    return released(196, vision, connector, decoder, tokens)


def deepseek_vl2_tiny() -> ConfigDict:
    """DeepSeek-VL2 tiny, of 1.0B parameters a token."""
    return _deepseek_vl2(language_models.deepseek_moe_3b())


def deepseek_vl2_small() -> ConfigDict:
    """DeepSeek-VL2 small, of 2.8B parameters a token."""
    return _deepseek_vl2(language_models.deepseek_moe_16b())


def deepseek_vl2_base() -> ConfigDict:
    """DeepSeek-VL2, of 4.5B parameters a token."""
    return _deepseek_vl2(language_models.deepseek_moe_27b())

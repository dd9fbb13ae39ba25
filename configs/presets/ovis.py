"""Ovis 2 (1B to 16B) and Ovis 2.5."""

from ml_collections import ConfigDict

from configs.presets import language_models, vision_encoders
from configs.presets.system import released

_TOKENS = {"pad": "<|endoftext|>", "bos": "<|endoftext|>", "eos": "<|im_end|>", "image": "<|image_pad|>"}
_VOCABULARY = {"kind": "visual_vocabulary", "vocab_size": 65_536}


def _ovis2(size: str, vision: ConfigDict) -> ConfigDict:
    """Its tiles are `config.processor.tiles`; the indicators between them are not laid out."""
    return released(256, vision, {**_VOCABULARY, "num_indicators": 5}, language_models.qwen2(size), _TOKENS)


def ovis2_1b() -> ConfigDict:
    """Ovis 2 1B."""
    return _ovis2("0.5b", vision_encoders.aimv2_l14_448())


def ovis2_2b() -> ConfigDict:
    """Ovis 2 2B."""
    return _ovis2("1.5b", vision_encoders.aimv2_l14_448())


def ovis2_4b() -> ConfigDict:
    """Ovis 2 4B."""
    return _ovis2("3b", vision_encoders.aimv2_h14_448())


def ovis2_8b() -> ConfigDict:
    """Ovis 2 8B."""
    return _ovis2("7b", vision_encoders.aimv2_h14_448())


def ovis2_16b() -> ConfigDict:
    """Ovis 2 16B."""
    return _ovis2("14b", vision_encoders.aimv2_h14_448())


def _ovis2_5(decoder: dict, most: int) -> ConfigDict:
    connector = {**_VOCABULARY, "num_indicators": 4}
    return released(most, vision_encoders.siglip2_navit_so400m_16(), connector, decoder, _TOKENS, min_tokens=196)


def ovis2_5_2b() -> ConfigDict:
    """Ovis 2.5 2B, for pictures of up to 1344 x 1792 pixels."""
    return _ovis2_5(language_models.qwen3_1_7b(), 2352)


def ovis2_5_9b() -> ConfigDict:
    """Ovis 2.5 9B, for pictures of up to 1792 x 1792 pixels."""
    return _ovis2_5(language_models.qwen3_8b(), 3136)

"""InternVL 2.5 and InternVL 3, up to 14B; the picture's tiles are `config.processor.tiles`."""

from ml_collections import ConfigDict

from configs.presets import language_models, vision_encoders
from configs.presets.system import released

_QWEN = {"pad": "<|endoftext|>", "bos": "<|endoftext|>", "eos": "<|im_end|>", "image": "<IMG_CONTEXT>"}
_INTERNLM = {"pad": "</s>", "bos": "<s>", "eos": "<|im_end|>", "image": "<IMG_CONTEXT>"}


def _internvl(decoder: dict, tokens: dict[str, str] = _QWEN) -> ConfigDict:
    vision = vision_encoders.internvit_300m_448()
    vision.encoder.update({"select_layer": -1, "remat": "full"})
    return released(256, vision, {"kind": "pixel_shuffle"}, decoder, tokens)


def internvl2_5_1b() -> ConfigDict:
    """InternVL 2.5 1B."""
    return _internvl(language_models.qwen2_of_internvl("0.5b"))


def internvl2_5_2b() -> ConfigDict:
    """InternVL 2.5 2B."""
    return _internvl(language_models.internlm2_1_8b(), _INTERNLM)


def internvl2_5_4b() -> ConfigDict:
    """InternVL 2.5 4B."""
    return _internvl(language_models.qwen2_of_internvl("3b"))


def internvl2_5_8b() -> ConfigDict:
    """InternVL 2.5 8B."""
    return _internvl(language_models.internlm2_7b(), _INTERNLM)


def internvl3_1b() -> ConfigDict:
    """InternVL 3 1B."""
    return _internvl(language_models.qwen2_of_internvl("0.5b"))


def internvl3_2b() -> ConfigDict:
    """InternVL 3 2B."""
    return _internvl(language_models.qwen2_of_internvl("1.5b"))


def internvl3_8b() -> ConfigDict:
    """InternVL 3 8B."""
    return _internvl(language_models.qwen2_of_internvl("7b"))


def internvl3_14b() -> ConfigDict:
    """InternVL 3 14B."""
    return _internvl(language_models.qwen2_of_internvl("14b"))

"""LLaVA 1.5 and 1.6 as transformers releases them (llava-hf), and MobileVLM V2."""

from ml_collections import ConfigDict

from configs.presets import language_models, vision_encoders
from configs.presets.system import released

_TOKENS = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "image": "<image>"}
_VOCABULARY = 32_064


def _tower() -> ConfigDict:
    """CLIP up to its last but one block."""
    preset = vision_encoders.clip_vit_l14_336()
    preset.encoder.update({"select_layer": -2, "pooling": "none", "final_norm": "none", "remat": "full"})
    return preset


def _llava(decoder: dict) -> ConfigDict:
    return released(576, _tower(), {"kind": "mlp"}, decoder, _TOKENS)


def llava_1_5_7b() -> ConfigDict:
    """LLaVA-1.5 with Vicuna 7B."""
    return _llava(language_models.vicuna_7b(_VOCABULARY))


def llava_1_5_13b() -> ConfigDict:
    """LLaVA-1.5 with Vicuna 13B."""
    return _llava(language_models.vicuna_13b(_VOCABULARY))


def llava_1_6_vicuna_7b() -> ConfigDict:
    """LLaVA-NeXT with Vicuna 7B: its tiles are `config.processor.tiles`, its newline is not laid out."""
    return _llava(language_models.vicuna_7b(_VOCABULARY))


def llava_1_6_vicuna_13b() -> ConfigDict:
    """LLaVA-NeXT with Vicuna 13B; likewise."""
    return _llava(language_models.vicuna_13b(_VOCABULARY))


def llava_1_6_mistral_7b() -> ConfigDict:
    """LLaVA-NeXT with Mistral 7B; likewise."""
    return _llava(language_models.mistral_7b(_VOCABULARY))


def _mobilevlm(decoder: dict) -> ConfigDict:
    return released(144, _tower(), {"kind": "ldp_v2"}, decoder)


def mobilevlm_v2_1_7b() -> ConfigDict:
    """MobileVLM V2 1.7B."""
    return _mobilevlm(language_models.mobilellama_1_4b())


def mobilevlm_v2_3b() -> ConfigDict:
    """MobileVLM V2 3B."""
    return _mobilevlm(language_models.mobilellama_2_7b())


def mobilevlm_v2_7b() -> ConfigDict:
    """MobileVLM V2 7B."""
    return _mobilevlm(language_models.vicuna_7b())

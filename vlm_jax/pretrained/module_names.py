"""Names of modules in `transformers`' classes, where they are not those of the released files.

Source: huggingface/transformers, conversion_mapping.py (5.24), by model type.
"""

_LLAVA = (
    (r"^language_model\.lm_head", "lm_head"),
    (r"^language_model\.model", "model.language_model"),
    (r"^vision_tower(\.vision_model)?", "model.vision_tower"),
    (r"^multi_modal_projector", "model.multi_modal_projector"),
)
_DEEPSEEK_OCR2 = (
    (r"^model\.(layers|norm|embed_tokens)", r"model.language_model.\1"),
    (r"^model\.qwen2_model\.model\.model", "model.vision_tower.vision_encoder"),
    (r"^model\.sam_model\.blocks", "model.vision_tower.sam_encoder.layers"),
    (r"^model\.projector\.layers", "model.multi_modal_projector"),
)
_QWEN2_VL = (
    (r"^visual", "model.visual"),
    (r"^model\.(?!language_model|visual)", "model.language_model."),
)
# Of the class of the thinker, which is the one that is trained.
_QWEN2_5_OMNI = (
    (r"^thinker\.", ""),
    (r"^(visual|audio_tower)", r"model.\1"),
    (r"^model\.(?!language_model|visual|audio_tower)", "model.language_model."),
)

# Model type -> (regular expression, replacement), applied to released keys in order; those of others are the same.
MODULE_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "deepseek_ocr2": _DEEPSEEK_OCR2,
    "dinov3_vit": ((r"^layer\.", "model.layer."),),
    "gemma3": _LLAVA,
    "internvl": _LLAVA,
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "paligemma": _LLAVA,
    "qwen2_5_omni": _QWEN2_5_OMNI,
    "qwen2_5_omni_thinker": _QWEN2_5_OMNI,
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
}

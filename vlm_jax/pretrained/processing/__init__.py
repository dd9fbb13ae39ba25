"""Processors of released systems, configured by the files of a checkpoint folder; one file a family.

Those of conversations have a function of a folder and its config that gives a `processors.processor.Processor`; those
of two towers and classifiers one of the module too, which gives a `processors.image_text.ImageTextProcessor`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.pretrained.processing import (
    deepseek,
    deepseek_hf,
    image_text,
    internvl,
    internvl_hf,
    llava,
    llava_hf,
    ovis,
    ovis2_hf,
    qwen,
    qwen_hf,
    text,
)
from vlm_jax.pretrained.processing.settings import Folder
from vlm_jax.processors.image_text import ImageTextProcessor
from vlm_jax.processors.processor import Processor


def _llava(folder: Folder, config: Mapping[str, Any]) -> Processor:
    """Of the release's own files or of those in transformers, which call themselves alike."""
    return (llava if "mm_vision_tower" in config else llava_hf).processor(folder, config)


# What a released config calls its kind of model (`family.marker`) -> what makes its processor.
PROCESSORS: dict[str, Callable[[Folder, Mapping[str, Any]], Processor]] = {
    "deepseek_v2": text.processor,
    "deepseek_vl": deepseek_hf.processor,
    "deepseek_vl_hybrid": deepseek_hf.processor_hybrid,
    "deepseek_vl_v2": deepseek.processor2,
    "internlm2": text.processor,
    "internvl": internvl_hf.processor,
    "internvl_chat": internvl.processor,
    "llama": text.processor,
    "llava": _llava,
    "llava_llama": llava.processor,
    "llava_next": llava_hf.processor_next,
    "mistral": text.processor,
    "mobilevlm": llava.processor,
    "multi_modality": deepseek.processor,
    "ovis": ovis.processor2,
    "ovis2": ovis2_hf.processor,
    "ovis2_5": ovis.processor2_5,
    "qwen": qwen.processor,
    "qwen2": text.processor,
    "qwen2_vl": qwen_hf.processor,
    "qwen2_5_vl": qwen_hf.processor,
    "qwen2_5_vl_text": text.processor,
    "qwen2_vl_text": text.processor,
    "qwen3": text.processor,
}
# The same of models that embed or classify, and answer no conversation.
IMAGE_TEXT_PROCESSORS: dict[str, Callable[[Folder, Mapping[str, Any], Any], ImageTextProcessor]] = {
    "big_vision.proj.image_text.text_transformer": image_text.big_vision,
    "big_vision.proj.image_text.two_towers": image_text.big_vision,
    "big_vision.vit": image_text.big_vision_vit,
    "clip": image_text.clip,
    "clip_text_model": image_text.clip,
    "clip_vision_model": image_text.clip,
    "open_clip": image_text.open_clip,
    "siglip": image_text.siglip,
    "siglip_text_model": image_text.siglip,
    "siglip_vision_model": image_text.siglip,
    "siglip2": image_text.siglip,
    "siglip2_text_model": image_text.siglip,
    "siglip2_vision_model": image_text.siglip,
    "vit": image_text.vit,
    "vit_jax": image_text.vit_jax,
}

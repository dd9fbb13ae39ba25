"""Processors of released systems, configured by the files of a checkpoint folder; one file a family.

Each has a function of a folder and its config that gives a `processors.system.Processor`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.pretrained.processing import (
    deepseek,
    deepseek_hf,
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
from vlm_jax.processors.system import Processor


def _llava(folder: Folder, config: Mapping[str, Any]) -> Processor:
    """Of the release's own files or of those in transformers, which call themselves alike."""
    return (llava if "mm_vision_tower" in config else llava_hf).processor(folder, config)


# What a released config calls its kind of model (`loader.marker`) -> what makes its processor.
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

"""Processors of released systems, configured by the files of a checkpoint folder; one file a family.

Each has a function of a folder and its config that gives a `processors.system.Processor`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.pretrained.processing import deepseek_hf, internvl_hf, llava_hf, ovis2_hf, qwen_hf, text
from vlm_jax.pretrained.processing.settings import Folder
from vlm_jax.processors.system import Processor

# What a released config calls its kind of model (`loader.marker`) -> what makes its processor.
PROCESSORS: dict[str, Callable[[Folder, Mapping[str, Any]], Processor]] = {
    "deepseek_vl": deepseek_hf.processor,
    "internlm2": text.processor,
    "internvl": internvl_hf.processor,
    "llama": text.processor,
    "llava": llava_hf.processor,
    "llava_next": llava_hf.processor_next,
    "ovis2": ovis2_hf.processor,
    "qwen2": text.processor,
    "qwen2_vl": qwen_hf.processor,
    "qwen2_5_vl": qwen_hf.processor,
    "qwen3": text.processor,
}

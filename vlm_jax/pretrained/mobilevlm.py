"""MobileVLM's CLIP, as its own release stores it: under LLaVA's names."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.checkpoints.rules import SourceTensor
from vlm_jax.pretrained import llava
from vlm_jax.pretrained.family import Description, with_defaults


def describe(
    config: Mapping[str, Any], checkpoint: Mapping[str, SourceTensor], *, dtype: Any, param_dtype: Any
) -> Description:
    """`MobileLlamaForCausalLM`'s tower; projector and language model are carried along."""
    del checkpoint  # the release has one schema
    settings = with_defaults(config, llava.DEFAULTS, "mobilevlm")
    encoder, pixels, rules, ignore = llava.tower(settings, {"dtype": dtype, "param_dtype": param_dtype})
    return Description(encoder, (pixels,), rules, (*llava.BESIDE, r"model\.mm_projector\..*", *ignore))

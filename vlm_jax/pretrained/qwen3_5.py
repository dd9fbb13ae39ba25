"""Qwen3.5, dense and with experts: Qwen3-VL's tower without levels, its merger, and the language model if any."""

from collections.abc import Mapping

from vlm_jax.checkpoints.rules import SourceTensor
from vlm_jax.pretrained import qwen3_vl
from vlm_jax.pretrained.family import Description
from vlm_jax.types import Config, Dtype, Fields


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """The full system, or its tower and merger if the checkpoint has only these.

    Levels of a config (`deepstack_visual_indexes`) are not read, as in transformers.
    """
    without: Fields = {"deepstack_visual_indexes": []}
    if config.get("vision_config"):
        config = {**config, "vision_config": {**config["vision_config"], **without}}
    else:
        config = {**config, **without}
    return qwen3_vl.describe(config, checkpoint, dtype=dtype, param_dtype=param_dtype)

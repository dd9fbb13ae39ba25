"""LLaVA's vision tower as its own release stores it: CLIP, at one scale or at several (S²)."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.config import did_you_mean
from vlm_jax.encoders.multiscale import MultiScale
from vlm_jax.encoders.vit import ViT
from vlm_jax.pretrained import clip
from vlm_jax.pretrained.family import REQUIRED, Description, PretrainedError, check_supported, with_defaults

# The config names its tower on the hub; these are what differs from the defaults in the tower's own config.
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {**_LARGE, "patch_size": 14, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_LARGE, "patch_size": 14, "image_size": 336},
}
# llava/model/multimodal_encoder/clip_encoder.py.
DEFAULTS: dict[str, Any] = {
    "mm_vision_tower": REQUIRED,
    "mm_vision_select_layer": REQUIRED,
    "mm_vision_select_feature": "patch",
    "s2": False,
    "s2_scales": "336,672,1008",
}
PREFIX = "model.vision_tower.vision_tower.vision_model."
NOT_VISION = (
    r"lm_head\..*",
    r"model\.(embed_tokens|layers|norm)\..*",
    r"model\.mm_projector\..*",
    r"model\.image_newline",
)


def describe(
    config: Mapping[str, Any], checkpoint: Mapping[str, SourceTensor], *, dtype: Any, param_dtype: Any
) -> Description:
    """`LlavaLlamaForCausalLM`'s vision tower; projector and language model are carried along.

    The tower's settings are those of `TOWERS` under `mm_vision_tower`, or the key `vision_tower_config`
    of the config, which no release has: the tower's own config.

    Raises:
      PretrainedError: an unknown tower, or scales that are no list of sizes.
    """
    del checkpoint  # the release has one schema
    settings = with_defaults(config, DEFAULTS, "llava_llama")
    check_supported(settings, {"mm_vision_select_feature": ("patch", "cls_patch")}, "llava_llama")
    name = settings["mm_vision_tower"]
    tower = config.get("vision_tower_config", TOWERS.get(name))
    if tower is None:
        raise PretrainedError(f"mm_vision_tower: no settings here for '{name}'{did_you_mean(name, TOWERS)}")
    vit = clip.vision_tower(
        tower,
        f"the config of {name}",
        pooling="none",
        final_norm="none",
        select_layer=settings["mm_vision_select_layer"],
        keep_class_token=settings["mm_vision_select_feature"] == "cls_patch",
        dtype=dtype,
        param_dtype=param_dtype,
    )
    ignore = (
        *NOT_VISION,
        re.escape(PREFIX) + r"(post_layernorm|embeddings\.position_ids).*",
        *_left_out(vit),
    )
    rules = prefixed(clip.vision_rules(vit), PREFIX)
    channels = tower.get("num_channels", 3)
    if not settings["s2"]:
        return Description(vit, (clip.image_shape(vit, channels),), rules, ignore)
    sizes = _scales(settings["s2_scales"])
    module = MultiScale(vit, scales=(), image_sizes=tuple((size, size) for size in sizes), max_split_size=sizes[0])
    pixels = jax.ShapeDtypeStruct((1, sizes[-1], sizes[-1], channels), jnp.float32)
    return Description(module, (pixels,), prefixed(rules, target="encoder/"), ignore)


def _left_out(vit: ViT) -> tuple[str, ...]:
    """Blocks behind the selected layer, which releases store and nothing reads."""
    blocks = map(str, range(vit.num_blocks, vit.depth))
    return tuple(re.escape(f"{PREFIX}encoder.layers.{block}.") + ".*" for block in blocks)


def _scales(text: str) -> list[int]:
    """`"336,672,1008"` as sorted sides in pixels."""
    try:
        return sorted(map(int, text.split(",")))
    except ValueError as error:
        raise PretrainedError(f"s2_scales: expected sides in pixels such as '336,672', got {text!r}") from error

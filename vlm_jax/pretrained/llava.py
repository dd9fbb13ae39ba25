"""LLaVA and MobileVLM in the format of their releases: CLIP, at one scale or several (S²), projector, Llama."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.config import did_you_mean
from vlm_jax.encoders.multiscale import MultiScale
from vlm_jax.encoders.vit import ViT
from vlm_jax.pretrained import clip
from vlm_jax.pretrained.composition import visual_half, with_language
from vlm_jax.pretrained.family import REQUIRED, Description, Names, PretrainedError, check_supported, with_defaults
from vlm_jax.pretrained.projector import mm_projector
from vlm_jax.pretrained.tables import image_shape, left_out
from vlm_jax.types import Config, Dtype, Fields

# The config has the tower's name on the hub; these are the non-default settings of the tower's own config.
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TOWERS: dict[str, Fields] = {
    "openai/clip-vit-large-patch14": {**_LARGE, "patch_size": 14, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_LARGE, "patch_size": 14, "image_size": 336},
}
# llava/model/multimodal_encoder/clip_encoder.py and multimodal_projector/builder.py, also used by MobileVLM.
DEFAULTS: Fields = {
    "hidden_size": REQUIRED,
    "mm_projector_type": "linear",
    "mm_vision_tower": REQUIRED,
    "mm_vision_select_layer": REQUIRED,
    "mm_vision_select_feature": "patch",
    "s2": False,
    "s2_scales": "336,672,1008",
}
PREFIX = "model.vision_tower.vision_tower.vision_model."
NEWLINE = "model.image_newline"
BESIDE = (r"lm_head\..*", r"model\.(embed_tokens|layers|norm)\..*", re.escape(NEWLINE))


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `LlavaLlamaForCausalLM` or a `MobileLlamaForCausalLM`; LLaVA-1.6 has a learned `image_newline`.

    The tower's settings are in `TOWERS` under `mm_vision_tower`, or in the key `vision_tower_config` of the
    config, the tower's own config, which `named_tower` reads from the tower's folder.

    Raises:
      PretrainedError: an unknown tower, an unsupported projector, or scales that are not a
        list of sizes.
    """
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    where = config["model_type"]
    settings = with_defaults(config, DEFAULTS, where)
    encoder, pixels, rules, ignore = _tower(settings, where, dtypes)
    connector, projector = mm_projector(settings["mm_projector_type"], settings["hidden_size"], where, **dtypes)
    rules = (*prefixed(rules, target="encoder/"), *prefixed(projector, target="connector/"))
    visual = visual_half(encoder, connector, pixels, rules, ignore)
    return with_language(
        visual,
        {**config, "model_type": "llama"},
        checkpoint,
        where,
        names=Names(),
        beside=BESIDE,
        learned_rows={"image_newline": NEWLINE} if NEWLINE in checkpoint else None,
        **dtypes,
    )


def _tower(
    settings: Config, where: str, dtypes: Config
) -> tuple[ViT | MultiScale, jax.ShapeDtypeStruct, tuple[Rule, ...], tuple[str, ...]]:
    """The encoder, the shape of an input, its rules and the patterns of unused keys."""
    check_supported(settings, {"mm_vision_select_feature": ("patch", "cls_patch")}, where)
    name = settings["mm_vision_tower"]
    section = settings.get("vision_tower_config", TOWERS.get(name))
    if section is None:
        raise PretrainedError(f"mm_vision_tower: unknown '{name}'{did_you_mean(name, TOWERS)}")
    vit = clip.vision_tower(
        section,
        f"the config of {name}",
        pooling="none",
        final_norm="none",
        select_layer=settings["mm_vision_select_layer"],
        keep_class_token=settings["mm_vision_select_feature"] == "cls_patch",
        **dtypes,
    )
    ignore = (
        re.escape(PREFIX) + r"(post_layernorm|embeddings\.position_ids).*",
        *left_out(vit, f"{PREFIX}encoder.layers."),
    )
    rules, channels = clip.vision_rules(vit), section.get("num_channels", 3)
    if not settings["s2"]:
        return vit, image_shape(vit, channels), prefixed(rules, PREFIX), ignore
    sizes = _scales(settings["s2_scales"])
    module = MultiScale(vit, scales=(), image_sizes=tuple((size, size) for size in sizes), max_split_size=sizes[0])
    pixels = jax.ShapeDtypeStruct((1, sizes[-1], sizes[-1], channels), jnp.float32)
    return module, pixels, prefixed(rules, PREFIX, "encoder/"), ignore


def _scales(text: str) -> list[int]:
    """`"336,672,1008"` as sorted sides in pixels."""
    try:
        return sorted(map(int, text.split(",")))
    except ValueError as error:
        raise PretrainedError(f"s2_scales: expected sides in pixels such as '336,672', got {text!r}") from error

"""Gemma 4: a tower of any image size, means of squares of patches with one linear layer, and a language model.

The audio tower of the small sizes (E2B, E4B) is not read: its tensors are kept and not loaded (`UNREAD`).
"""

import re
from collections.abc import Mapping

from vlm_jax.checkpoints.maps.gemma4 import pooler_rules, tower_rules
from vlm_jax.checkpoints.maps.torch_layers import linear
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.connectors.block_mean import BlockMean
from vlm_jax.encoders.axial_vit import AxialViT
from vlm_jax.pretrained.composition import text_names, text_section, visual_half, with_language
from vlm_jax.pretrained.family import (
    ACTIVATIONS,
    REQUIRED,
    Description,
    PretrainedError,
    beside,
    check_supported,
    find_prefix,
    with_defaults,
)
from vlm_jax.pretrained.gemma4_text import TEXT_DEFAULTS
from vlm_jax.pretrained.hugging_face import text_sizes
from vlm_jax.pretrained.qwen2_vl import packed_shapes
from vlm_jax.types import Config, Dtype, Fields

# transformers, models/gemma4/configuration_gemma4.py: Gemma4Config and Gemma4VisionConfig.
DEFAULTS: Fields = {"vision_config": REQUIRED, "text_config": REQUIRED}
VISION_DEFAULTS: Fields = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "pooling_kernel_size": 3,
    "patch_size": 16,
    "position_embedding_size": 10_240,
    "use_clipped_linears": False,
    "standardize": False,
}
# Keys of the audio tower and its projection, which are not read, behind the prefix of the system's.
UNREAD = r"(audio_tower|embed_audio)\..*"
_TABLE = "patch_embedder.position_embedding_table"


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `Gemma4ForConditionalGeneration`, or its model without a head."""
    where, dtypes = config["model_type"], {"dtype": dtype, "param_dtype": param_dtype}
    settings = with_defaults(config, DEFAULTS, where)
    for name in ("vision_config", "text_config"):
        if not isinstance(settings[name], Mapping):
            raise PretrainedError(f"{where}.{name}: expected an object, got {settings[name]!r}")
    vision = with_defaults(settings["vision_config"], VISION_DEFAULTS, f"{where}.vision_config")
    encoder = tower(settings["vision_config"], f"{where}.vision_config", **dtypes)
    connector = BlockMean(
        with_defaults(settings["text_config"], TEXT_DEFAULTS, f"{where}.text_config")["hidden_size"],
        encoder.merge_size,
        scale=encoder.width**0.5,
        standardize=vision["standardize"],
        norm_epsilon=vision["rms_norm_eps"],
        **dtypes,
    )
    prefix = find_prefix(checkpoint, _TABLE)
    projection = find_prefix(checkpoint, "embed_vision.embedding_projection.weight")
    rules = (
        *prefixed(_tower_rules(encoder), prefix, "encoder/"),
        *prefixed(pooler_rules(standardize=connector.standardize), prefix, "connector/"),
        *linear(f"{projection}embed_vision.embedding_projection", "connector/project", bias=False),
    )
    visual = visual_half(
        encoder,
        connector,
        packed_shapes(encoder.patch_dim, encoder.merge_size, encoder.window),
        rules,
        (rf"{re.escape(projection)}{UNREAD}",),
    )
    return with_language(
        visual,
        text_section(config, checkpoint, kind="gemma4_text", tied=True),
        checkpoint,
        f"{where}.text_config",
        names=text_names(checkpoint),
        beside=beside(prefix, f"{projection}embed_vision.", f"{projection}audio_tower.", f"{projection}embed_audio."),
        **dtypes,
    )


def describe_vision(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `Gemma4VisionModel`: its tower, without the pooler."""
    where = config["model_type"]
    encoder = tower(config, where, dtype=dtype, param_dtype=param_dtype)
    prefix = find_prefix(checkpoint, _TABLE)
    inputs = packed_shapes(encoder.patch_dim, encoder.merge_size, encoder.window)
    ignore = (rf"{re.escape(prefix)}std_(bias|scale)",)
    return Description(encoder, (inputs,), prefixed(_tower_rules(encoder), prefix), ignore)


def tower(config: Config, where: str, **dtypes: Dtype) -> AxialViT:
    """The unbound tower of a `Gemma4VisionConfig`.

    Args:
      config: the released section.
      where: name of the section for errors.
      **dtypes: `dtype` and `param_dtype`.

    Raises:
      PretrainedError: unsupported settings.
    """
    read = {key: value for key, value in config.items() if key in VISION_DEFAULTS}
    settings = with_defaults(read, VISION_DEFAULTS, where)
    rope = {"rope_type": "axial", "rope_theta": 100.0, **(settings["rope_parameters"] or {})}
    check_supported(settings, {"hidden_activation": tuple(ACTIVATIONS)}, where)
    check_supported(rope, {"rope_type": ("axial", "default")}, f"{where}.rope_parameters")
    heads, kv_heads, head_dim = text_sizes({**settings, "vocab_size": 1}, where)
    if head_dim % 4:
        raise PretrainedError(f"{where}.head_dim: expected a multiple of 4, for positions on two axes, got {head_dim}")
    return AxialViT(
        patch_size=settings["patch_size"],
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=settings["intermediate_size"],
        activation=ACTIVATIONS[settings["hidden_activation"]],
        norm_epsilon=settings["rms_norm_eps"],
        merge_size=settings["pooling_kernel_size"],
        table_length=settings["position_embedding_size"],
        rope_theta=float(rope["rope_theta"]),
        clips=settings["use_clipped_linears"],
        **dtypes,
    )


def _tower_rules(encoder: AxialViT) -> tuple[Rule, ...]:
    assert encoder.head_dim is not None and encoder.num_kv_heads is not None
    return tower_rules(
        head_dim=encoder.head_dim,
        num_heads=encoder.num_heads,
        num_kv_heads=encoder.num_kv_heads,
        table=encoder.table_length,
        width=encoder.width,
        clips=encoder.clips,
    )

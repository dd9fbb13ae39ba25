"""MiniCPM-V 4.6: SigLIP that merges patches between its blocks, a merger behind it, and a language model."""

from collections.abc import Mapping

from vlm_jax.checkpoints.maps.minicpm_v import merger_rules, tower_rules
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.connectors.pixel_shuffle import PixelShuffle
from vlm_jax.encoders.merging_vit import SIDE, MergingViT
from vlm_jax.pretrained.composition import text_names, text_section, visual_half, with_language
from vlm_jax.pretrained.family import (
    REQUIRED,
    Description,
    PretrainedError,
    beside,
    check_supported,
    find_prefix,
    one_side,
    with_defaults,
)
from vlm_jax.pretrained.hugging_face import block_fields
from vlm_jax.pretrained.qwen2_vl import packed_shapes
from vlm_jax.pretrained.qwen3_5_text import DEFAULTS as TEXT_DEFAULTS
from vlm_jax.types import Config, Dtype, Fields

# transformers, models/minicpmv4_6/configuration_minicpmv4_6.py: MiniCPMV4_6Config and MiniCPMV4_6VisionConfig.
DEFAULTS: Fields = {
    "vision_config": REQUIRED,
    "text_config": REQUIRED,
    "insert_layer_id": 6,
    "downsample_mode": "16x",
    "merge_kernel_size": [2, 2],
    "merger_times": 1,
}
VISION_DEFAULTS: Fields = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "insert_layer_id": 6,
    "window_kernel_size": [2, 2],
}
MODES = {"16x": True, "4x": False}  # -> whether the tower merges
_PATCHES = "embeddings.patch_embedding.weight"
_MERGER_EPSILON = 1e-6  # of MiniCPMV4_6DownsampleMLP


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `MiniCPMV4_6ForConditionalGeneration`, or its model without a head.

    The merger is in the checkpoint in both modes of downsampling. `drop_vision_last_layer` is not read, as in
    transformers.
    """
    where, dtypes = config["model_type"], {"dtype": dtype, "param_dtype": param_dtype}
    settings = with_defaults(config, DEFAULTS, where)
    for name in ("vision_config", "text_config"):
        if not isinstance(settings[name], Mapping):
            raise PretrainedError(f"{where}.{name}: expected an object, got {settings[name]!r}")
    check_supported(settings, {"downsample_mode": tuple(MODES), "merger_times": (1,)}, where)
    _check_square(settings, "merge_kernel_size", where)
    # As in transformers, the number beside the sections takes precedence over the section's own.
    vision = {**settings["vision_config"], "insert_layer_id": settings["insert_layer_id"]}
    encoder = tower(vision, f"{where}.vision_config", merges=MODES[settings["downsample_mode"]], **dtypes)
    text = with_defaults(settings["text_config"], {"hidden_size": TEXT_DEFAULTS["hidden_size"]}, f"{where}.text_config")
    connector = PixelShuffle(
        text["hidden_size"], SIDE, norm_epsilon=_MERGER_EPSILON, mlp_dim=SIDE**2 * encoder.width, **dtypes
    )
    prefix = find_prefix(checkpoint, _PATCHES)
    merger = f"{find_prefix(checkpoint, 'merger.mlp.0.pre_norm.weight')}merger."
    rules = (
        *prefixed(_tower_rules(encoder), prefix, "encoder/"),
        *prefixed(merger_rules(), f"{merger}mlp.0.", "connector/"),
    )
    inputs = packed_shapes(encoder.channels * encoder.patch_size**2, encoder.patch_format.merge_size, None)
    return with_language(
        visual_half(encoder, connector, inputs, rules),
        text_section(config, checkpoint, kind="qwen3_5_text", tied=False),
        checkpoint,
        f"{where}.text_config",
        names=text_names(checkpoint),
        beside=beside(prefix, merger),
        **dtypes,
    )


def describe_vision(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `MiniCPMV4_6VisionModel`: its tower, which merges patches."""
    encoder = tower(config, config["model_type"], merges=True, dtype=dtype, param_dtype=param_dtype)
    inputs = packed_shapes(encoder.channels * encoder.patch_size**2, encoder.patch_format.merge_size, None)
    return Description(encoder, (inputs,), prefixed(_tower_rules(encoder), find_prefix(checkpoint, _PATCHES)))


def tower(config: Config, where: str, *, merges: bool, **dtypes: Dtype) -> MergingViT:
    """The unbound tower of a `MiniCPMV4_6VisionConfig`.

    Args:
      config: the released section.
      where: name of the section for errors.
      merges: whether it merges patches, as in the mode `16x`.
      **dtypes: `dtype` and `param_dtype`.

    Raises:
      PretrainedError: unsupported settings.
    """
    settings = with_defaults(config, VISION_DEFAULTS, where)
    _check_square(settings, "window_kernel_size", where)
    layer, depth = settings["insert_layer_id"], settings["num_hidden_layers"]
    if not 0 <= layer < depth:
        raise PretrainedError(f"{where}.insert_layer_id: expected a layer from 0 to {depth - 1}, got {layer}")
    return MergingViT(
        patch_size=settings["patch_size"],
        table_side=one_side(settings["image_size"], f"{where}.image_size") // settings["patch_size"],
        channels=settings["num_channels"],
        merge_after=layer + 1,
        merges=merges,
        **block_fields(settings, where),
        **dtypes,
    )


def _check_square(settings: Config, key: str, where: str) -> None:
    """Raises unless squares are of 2x2, which the sizes of images and of both mergers depend on."""
    if list(settings[key]) != [SIDE, SIDE]:
        raise PretrainedError(f"{where}.{key}: expected [{SIDE}, {SIDE}], got {settings[key]!r}")


def _tower_rules(encoder: MergingViT) -> tuple[Rule, ...]:
    return tower_rules(
        width=encoder.width,
        window=(encoder.channels, encoder.patch_size, encoder.patch_size),
        depth=encoder.depth,
        merge_after=encoder.merge_after,
    )

"""Qwen3-VL, dense and with experts: the vision tower and its mergers, with or without the language model."""

from collections.abc import Mapping

from vlm_jax.checkpoints.maps.qwen_vit import encoder_rules, level_merger_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.connectors.concat import Concat
from vlm_jax.encoders.siglip2_navit import Siglip2NaViT
from vlm_jax.pretrained.composition import text_names, text_section, visual_half, with_language
from vlm_jax.pretrained.family import (
    ACTIVATIONS,
    Description,
    PretrainedError,
    beside,
    check_supported,
    find_prefix,
    square_root,
    with_defaults,
)
from vlm_jax.pretrained.qwen2_vl import packed_shapes
from vlm_jax.types import Config, Dtype, Fields

# transformers, models/qwen3_vl/configuration_qwen3_vl.py, Qwen3VLVisionConfig.
DEFAULTS: Fields = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
    "rope_parameters": None,
}


def visual(config: Config, where: str, **dtypes: Dtype) -> tuple[Siglip2NaViT, Concat, tuple[int, ...]]:
    """Tower and mergers of a `Qwen3VLVisionConfig`, and of every level the number of its released merger.

    Args:
      config: the released section.
      where: name of the section for errors.
      **dtypes: `dtype` and `param_dtype`.

    Raises:
      PretrainedError: unsupported settings.
    """
    settings = with_defaults(config, DEFAULTS, where)
    rope = {"rope_type": "axial", "rope_theta": 10_000.0, **(settings["rope_parameters"] or {})}
    check_supported(settings, {"hidden_act": tuple(ACTIVATIONS)}, where)
    check_supported(rope, {"rope_type": ("axial", "default")}, f"{where}.rope_parameters")
    for key in ("patch_size", "temporal_patch_size"):
        if not isinstance(settings[key], int):
            raise PretrainedError(f"{where}.{key}: expected one integer, got {settings[key]!r}")
    layers, depth = list(settings["deepstack_visual_indexes"]), settings["depth"]
    if len(set(layers)) < len(layers) or not all(0 <= layer < depth for layer in layers):
        raise PretrainedError(
            f"{where}.deepstack_visual_indexes: expected different layers from 0 to {depth - 1}, got {layers}"
        )
    encoder = Siglip2NaViT(
        table_side=square_root(settings["num_position_embeddings"], f"{where}.num_position_embeddings"),
        interpolation="bilinear_corners",
        patch_size=settings["patch_size"],
        temporal_patch_size=settings["temporal_patch_size"],
        merge_size=settings["spatial_merge_size"],
        width=settings["hidden_size"],
        depth=depth,
        num_heads=settings["num_heads"],
        mlp_dim=settings["intermediate_size"],
        activation=ACTIVATIONS[settings["hidden_act"]],
        channels=settings["in_channels"],
        rope_theta=float(rope["rope_theta"]),
        levels=tuple(layer + 1 for layer in sorted(layers)),
        **dtypes,
    )
    connector = Concat(settings["out_hidden_size"], encoder.merge_size, levels=len(layers), **dtypes)
    return encoder, connector, tuple(layers.index(layer) for layer in sorted(layers))


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """The full system, or its tower and mergers if the checkpoint has only these.

    The tower's names start with `model.visual.` in released files, and have no prefix in a tower's own file.
    """
    kind = config["model_type"]
    where = f"{kind}.vision_config" if "vision_config" in config else kind
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    encoder, connector, mergers = visual(config.get("vision_config") or config, where, **dtypes)
    window = (encoder.channels, encoder.temporal_patch_size, encoder.patch_size, encoder.patch_size)
    prefix = find_prefix(checkpoint, "patch_embed.proj.weight")
    tower = encoder_rules(width=encoder.width, window=window, gated=False, table=True)
    rules = (*prefixed(tower, prefix, "encoder/"), *prefixed(level_merger_rules(mergers), prefix, "connector/"))
    inputs = packed_shapes(encoder.patch_dim, encoder.merge_size, encoder.window)
    return with_language(
        visual_half(encoder, connector, inputs, rules),
        text_section(config, checkpoint, kind=f"{kind.removesuffix('_vision')}_text", tied=False),
        checkpoint,
        f"{kind}.text_config",
        names=text_names(checkpoint),
        beside=beside(prefix),
        **dtypes,
    )

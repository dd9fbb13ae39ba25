"""LLaVA-OneVision 1.5: RICE-ViT and its merger, with or without the language model."""

from collections.abc import Mapping

from vlm_jax.checkpoints.maps.qwen_vit import merger_rules
from vlm_jax.checkpoints.maps.rice_vit import encoder_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.connectors.concat import Concat
from vlm_jax.encoders.rice_vit import RiceViT
from vlm_jax.pretrained.composition import text_names, text_section, visual_half, with_language
from vlm_jax.pretrained.family import ACTIVATIONS, Description, beside, check_supported, find_prefix, with_defaults
from vlm_jax.pretrained.qwen2_vl import packed_shapes
from vlm_jax.types import Config, Dtype, Fields

# EvolvingLMMs-Lab/LLaVA-OneVision-1.5, configuration_llavaonevision1_5.py, RiceConfig. The released code ignores
# temporal_patch_size, as a patch has one frame, and embed_dim.
DEFAULTS: Fields = {
    "depth": 24,
    "hidden_size": 1024,
    "hidden_act": "gelu",
    "intermediate_size": 4096,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "layer_norm_eps": 1e-5,
    "text_hidden_size": 2560,
}


def visual(config: Config, where: str, **dtypes: Dtype) -> tuple[RiceViT, Concat]:
    """Tower and merger of a `RiceConfig`.

    Args:
      config: the released section.
      where: name of the section for errors.
      **dtypes: `dtype` and `param_dtype`.

    Raises:
      PretrainedError: unsupported settings.
    """
    settings = with_defaults(config, DEFAULTS, where)
    check_supported(settings, {"hidden_act": tuple(ACTIVATIONS)}, where)
    encoder = RiceViT(
        patch_size=settings["patch_size"],
        merge_size=settings["spatial_merge_size"],
        width=settings["hidden_size"],
        depth=settings["depth"],
        num_heads=settings["num_heads"],
        mlp_dim=settings["intermediate_size"],
        activation=ACTIVATIONS[settings["hidden_act"]],
        channels=settings["in_channels"],
        norm_epsilon=settings["layer_norm_eps"],
        **dtypes,
    )
    epsilon = settings["layer_norm_eps"]
    return encoder, Concat(settings["text_hidden_size"], encoder.merge_size, norm_epsilon=epsilon, **dtypes)


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """The full system, or its tower and merger if the checkpoint has only these.

    The tower's names start with `visual.`, in newer files with `model.visual.`, and have no prefix in a tower's own
    file.
    """
    kind = config["model_type"]
    where = f"{kind}.vision_config" if "vision_config" in config else kind
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    encoder, connector = visual(config.get("vision_config", config) or {}, where, **dtypes)
    prefix = find_prefix(checkpoint, "patch_embed.proj.weight")
    window = (encoder.channels, encoder.patch_size, encoder.patch_size)
    tower = encoder_rules(width=encoder.width, window=window)
    rules = (*prefixed(tower, prefix, "encoder/"), *prefixed(merger_rules(gated=False), prefix, "connector/"))
    inputs = packed_shapes(encoder.patch_dim, encoder.merge_size, encoder.window, class_tokens=True)
    return with_language(
        visual_half(encoder, connector, inputs, rules),
        text_section(config, checkpoint, kind="LLaVAOneVision1_5_text", tied=False),
        checkpoint,
        f"{kind}.text_config",
        names=text_names(checkpoint),
        beside=beside(prefix),
        **dtypes,
    )

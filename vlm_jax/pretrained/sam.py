"""SAM's image encoder in the format of transformers: `SamVisionModel`, or a part of `SamModel`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.maps.sam import HUGGING_FACE, encoder_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.encoders.sam import SAM, block_runs
from vlm_jax.pretrained.family import Description, check_supported, find_prefix, with_defaults
from vlm_jax.types import Config, Dtype, Fields

# transformers, models/sam/configuration_sam.py, SamVisionConfig.
VISION_DEFAULTS: Fields = {
    "hidden_size": 768,
    "output_channels": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 1024,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "mlp_ratio": 4.0,
    "mlp_dim": None,
    "use_abs_pos": True,
    "use_rel_pos": True,
    "window_size": 14,
    "global_attn_indexes": [2, 5, 8, 11],
}
# The parts of SamModel that compute masks from prompts and features.
MASK_PARTS = (r"prompt_encoder\..*", r"mask_decoder\..*", r"shared_image_embedding\..*")


def vision_encoder(config: Config, where: str, **fields: Any) -> SAM:
    """The unbound encoder of a `SamVisionConfig`.

    Args:
      config: the released section.
      where: name of the section for errors.
      **fields: more fields of `SAM`.
    """
    settings = with_defaults(config, VISION_DEFAULTS, where)
    check_supported(settings, {"hidden_act": ("gelu",), "use_abs_pos": (True,), "use_rel_pos": (True,)}, where)
    size = settings["image_size"]
    mlp_dim = settings["mlp_dim"]
    return SAM(
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        patch_size=settings["patch_size"],
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        mlp_dim=int(settings["hidden_size"] * settings["mlp_ratio"]) if mlp_dim is None else mlp_dim,
        neck_dim=settings["output_channels"],
        global_blocks=tuple(settings["global_attn_indexes"]),
        window_size=settings["window_size"],
        qkv_bias=settings["qkv_bias"],
        norm_epsilon=settings["layer_norm_eps"],
        **fields,
    )


def stacks(module: SAM) -> tuple[tuple[str, range], ...]:
    """The scanned stacks of an encoder and the blocks of each, for the checkpoint map."""
    return tuple((run.name, range(run.start, run.stop)) for run in block_runs(module.depth, module.global_blocks))


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """`SamVisionModel`, or the image encoder of `SamModel`; the mask parts are kept but not loaded."""
    section = config.get("vision_config", config)
    module = vision_encoder(section, config["model_type"], dtype=dtype, param_dtype=param_dtype)
    rules = encoder_rules(
        HUGGING_FACE,
        grid=module.patch_grid(*module.image_size),
        width=module.width,
        neck_dim=module.neck_dim,
        runs=stacks(module),
        qkv_bias=module.qkv_bias,
    )
    prefix = find_prefix(checkpoint, "patch_embed.projection.weight")
    channels = section.get("num_channels", VISION_DEFAULTS["num_channels"])
    pixels = jax.ShapeDtypeStruct((1, *module.image_size, channels), jnp.float32)
    return Description(module, (pixels,), prefixed(rules, source=prefix), ignore=MASK_PARTS)

"""Gemma 3 of transformers: SigLIP pooled to a square of tokens, a norm with one linear layer, and Gemma."""

import math
import re
from collections.abc import Mapping

from vlm_jax.checkpoints.maps.clip import siglip_tower_rules
from vlm_jax.checkpoints.maps.torch_layers import rms_norm
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.connectors.pool import Pool
from vlm_jax.encoders.vit import ViT
from vlm_jax.pretrained.composition import text_names, text_section, visual_half, with_language
from vlm_jax.pretrained.family import (
    REQUIRED,
    Description,
    PretrainedError,
    beside,
    check_supported,
    find_prefix,
    with_defaults,
)
from vlm_jax.pretrained.gemma import GEMMA3_DEFAULTS
from vlm_jax.pretrained.siglip import VISION_DEFAULTS, vision_tower
from vlm_jax.pretrained.tables import image_shape
from vlm_jax.types import Config, Dtype, Fields, Grid

# transformers, models/gemma3/configuration_gemma3.py, Gemma3Config.
DEFAULTS: Fields = {"vision_config": REQUIRED, "text_config": REQUIRED, "mm_tokens_per_image": 256}
_PROJECTION = "multi_modal_projector.mm_input_projection_weight"


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `Gemma3ForConditionalGeneration`, or its model without a head."""
    where, dtypes = config["model_type"], {"dtype": dtype, "param_dtype": param_dtype}
    settings = with_defaults(config, DEFAULTS, where)
    section = {"model_type": "siglip_vision_model", **settings["vision_config"]}
    check_supported(section, {"model_type": ("siglip_vision_model",)}, f"{where}.vision_config")
    vision = with_defaults(section, VISION_DEFAULTS, f"{where}.vision_config")
    vit = vision_tower(section, f"{where}.vision_config", pooling="none", **dtypes)
    width = with_defaults(settings["text_config"], GEMMA3_DEFAULTS, f"{where}.text_config")["hidden_size"]
    connector = Pool(
        width,
        token_grid(vit, settings["mm_tokens_per_image"], where),
        norm="rms_from_one",
        norm_epsilon=vision["layer_norm_eps"],
        depth=1,
        use_bias=False,
        **dtypes,
    )
    tower = find_prefix(checkpoint, "embeddings.patch_embedding.weight")
    names = f"{find_prefix(checkpoint, _PROJECTION)}multi_modal_projector."
    visual = visual_half(
        vit,
        connector,
        image_shape(vit, vision["num_channels"]),
        (
            *prefixed(siglip_tower_rules(), tower, "encoder/"),
            *rms_norm(f"{names}mm_soft_emb_norm", "connector/norm"),
            Rule(f"{names}mm_input_projection_weight", "connector/mlp/down/kernel"),
        ),
        (re.escape(f"{tower}head.") + ".*",),  # SigLIP's attention pooling, which is not used
    )
    return with_language(
        visual,
        text_section(config, checkpoint, kind="gemma3_text", tied=True),
        checkpoint,
        f"{where}.text_config",
        names=text_names(checkpoint),
        beside=beside(tower, names),
        **dtypes,
    )


def token_grid(vit: ViT, tokens: int, where: str) -> Grid:
    """Rows and columns of tokens: means of squares of patches, as many to a side as there are for each token.

    Raises:
      PretrainedError: squares of one side do not cover the patches of an image.
    """
    assert vit.image_size is not None  # a SigLIP config always has it
    side, _ = vit.grid(*vit.image_size)
    window = side // max(math.isqrt(tokens), 1)
    if not window or side % window:
        raise PretrainedError(
            f"{where}.mm_tokens_per_image: expected the square of a divisor of {side}, the patches of a side, got "
            f"{tokens}"
        )
    return side // window, side // window

"""PaliGemma and PaliGemma 2 of transformers: SigLIP, one linear layer, and Gemma or Gemma 2."""

import re
from collections.abc import Mapping

from vlm_jax.checkpoints.maps.clip import siglip_tower_rules
from vlm_jax.checkpoints.maps.torch_layers import linear
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.pretrained.big_vision_paligemma import MODEL_NAME, is_paligemma
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
from vlm_jax.pretrained.gemma import GEMMA2_DEFAULTS, GEMMA_DEFAULTS
from vlm_jax.pretrained.siglip import VISION_DEFAULTS, vision_tower
from vlm_jax.pretrained.tables import image_shape
from vlm_jax.types import Config, Dtype, Fields

# transformers, models/paligemma/configuration_paligemma.py, PaliGemmaConfig.
DEFAULTS: Fields = {"vision_config": REQUIRED, "text_config": REQUIRED, "projection_dim": 2048}
_TEXT_DEFAULTS = {"gemma": GEMMA_DEFAULTS, "gemma2": GEMMA2_DEFAULTS}
_PROJECTION = "multi_modal_projector.linear.weight"


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `PaliGemmaForConditionalGeneration`, or its model without a head.

    Visual tokens enter the decoder as the projection gives them: embedded text alone is scaled.
    """
    where, dtypes = config["model_type"], {"dtype": dtype, "param_dtype": param_dtype}
    if is_paligemma(checkpoint):
        raise PretrainedError(
            f"{where}: the config is one of transformers, but the tensors have names of big_vision; pass "
            f"config=dict(model_name='{MODEL_NAME}')"
        )
    settings = with_defaults(config, DEFAULTS, where)
    section = {"model_type": "siglip_vision_model", **settings["vision_config"]}
    check_supported(section, {"model_type": ("siglip_vision_model",)}, f"{where}.vision_config")
    vision = with_defaults(section, VISION_DEFAULTS, f"{where}.vision_config")
    vit = vision_tower(section, f"{where}.vision_config", pooling="none", **dtypes)
    # The prefix is one group of the batch, whatever `use_bidirectional_attention` states.
    text = {**text_section(config, checkpoint, kind="gemma", tied=True), "use_bidirectional_attention": None}
    check_supported(text, {"model_type": tuple(_TEXT_DEFAULTS)}, f"{where}.text_config")
    width = with_defaults(text, _TEXT_DEFAULTS[text["model_type"]], f"{where}.text_config")["hidden_size"]
    if settings["projection_dim"] != width:
        raise PretrainedError(
            f"{where}.projection_dim: expected the width of the language model, {width} "
            f"({where}.text_config.hidden_size), got {settings['projection_dim']!r}"
        )
    tower = find_prefix(checkpoint, "embeddings.patch_embedding.weight")
    names = f"{find_prefix(checkpoint, _PROJECTION)}multi_modal_projector."
    visual = visual_half(
        vit,
        MlpConnector(width, depth=1, **dtypes),
        image_shape(vit, vision["num_channels"]),
        (
            *prefixed(siglip_tower_rules(), tower, "encoder/"),
            *linear(f"{names}linear", "connector/mlp/down"),
        ),
        (re.escape(f"{tower}head.") + ".*",),  # SigLIP's attention pooling, which is not used
    )
    return with_language(
        visual,
        text,
        checkpoint,
        f"{where}.text_config",
        names=text_names(checkpoint),
        beside=beside(tower, names),
        **dtypes,
    )

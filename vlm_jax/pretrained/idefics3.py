"""Idefics3 and SmolVLM of transformers: SigLIP, a pixel shuffle with one linear layer, and a language model."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.checkpoints.maps.clip import siglip_tower_rules
from vlm_jax.checkpoints.maps.torch_layers import linear
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.connectors.pixel_shuffle import PixelShuffle
from vlm_jax.encoders.vit import ViT
from vlm_jax.pretrained.composition import text_names, text_section, visual_half, with_language
from vlm_jax.pretrained.family import REQUIRED, Description, beside, find_prefix, with_defaults
from vlm_jax.pretrained.hugging_face import vit_fields
from vlm_jax.pretrained.tables import image_shape
from vlm_jax.types import Config, Dtype, Fields

# transformers, models/idefics3/configuration_idefics3.py and models/smolvlm/configuration_smolvlm.py.
VISION_DEFAULTS: Fields = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
DEFAULTS: Fields = {"vision_config": REQUIRED, "text_config": REQUIRED, "scale_factor": 2}
_TEXT_WIDTH = 4096  # of LlamaConfig


def vision_tower(config: Config, where: str, **fields: Any) -> tuple[ViT, int]:
    """The ViT of an `Idefics3VisionConfig` or a `SmolVLMVisionConfig`, and the channels of its images.

    Tiles are square, without padding, so that the masks of the release's tower are not needed.

    Args:
      config: the released section.
      where: name of the section for errors.
      **fields: more fields of `ViT`.
    """
    settings = with_defaults(config, VISION_DEFAULTS, where)
    own = {**vit_fields(settings, where), "position_interpolation": "cell"}
    return ViT(**{**own, **fields}), settings["num_channels"]


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """An `Idefics3ForConditionalGeneration` or a `SmolVLMForConditionalGeneration`, or its model without a head."""
    where, dtypes = config["model_type"], {"dtype": dtype, "param_dtype": param_dtype}
    settings = with_defaults(config, DEFAULTS, where)
    vit, channels = vision_tower(settings["vision_config"], f"{where}.vision_config", **dtypes)
    width = with_defaults(settings["text_config"], {"hidden_size": _TEXT_WIDTH}, f"{where}.text_config")["hidden_size"]
    tower = find_prefix(checkpoint, "embeddings.patch_embedding.weight")
    names = f"{find_prefix(checkpoint, 'connector.modality_projection.proj.weight')}connector."
    visual = visual_half(
        vit,
        PixelShuffle(width, settings["scale_factor"], norm=None, depth=1, use_bias=False, **dtypes),
        image_shape(vit, channels),
        (
            *prefixed(siglip_tower_rules(), tower, "encoder/"),
            *linear(f"{names}modality_projection.proj", "connector/mlp/down", bias=False),
        ),
    )
    return with_language(
        visual,
        text_section(config, checkpoint, kind="llama", tied=False),
        checkpoint,
        f"{where}.text_config",
        names=text_names(checkpoint),
        beside=beside(tower, names),
        **dtypes,
    )


def describe_vision(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """An `Idefics3VisionTransformer` or a `SmolVLMVisionTransformer`."""
    vit, channels = vision_tower(config, config["model_type"], dtype=dtype, param_dtype=param_dtype)
    prefix = find_prefix(checkpoint, "embeddings.patch_embedding.weight")
    return Description(vit, (image_shape(vit, channels),), prefixed(siglip_tower_rules(), prefix))

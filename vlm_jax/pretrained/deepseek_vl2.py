"""DeepSeek-VL2 in the format of its release: SigLIP, the projector, two learned rows and the language model."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.checkpoints.maps.timm import vit_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.encoders.vit import ViT
from vlm_jax.pretrained.composition import visual_half, with_language
from vlm_jax.pretrained.family import REQUIRED, Description, Names, check_supported, with_defaults
from vlm_jax.pretrained.projector import mlp_projector
from vlm_jax.pretrained.tables import image_shape, num_patches
from vlm_jax.types import Config, Dtype, Fields

# deepseek_vl2/models/modeling_deepseek_vl_v2.py, VisionEncoderConfig and MlpProjectorConfig.
VISION_DEFAULTS: Fields = {
    "image_size": 384,
    "patch_size": 16,
    "width": 1024,
    "layers": 24,
    "heads": 16,
    "mlp_ratio": 4,
    "class_token": False,
}
PROJECTOR_DEFAULTS: Fields = {
    "projector_type": "downsample_mlp_gelu",
    "input_dim": 1152,
    "n_embed": 2048,
    "token_pooling": False,
}
LEARNED_ROWS = {"image_newline": "image_newline", "view_separator": "view_seperator"}
BESIDE = (r"language\..*", *LEARNED_ROWS.values())
UNUSED = (r"vision\.attn_pool\..*",)


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `DeepseekVLV2ForCausalLM`, whose tiles are laid out in two dimensions."""
    where, dtypes = "deepseek_vl_v2", {"dtype": dtype, "param_dtype": param_dtype}
    defaults = {"vision_config": REQUIRED, "projector_config": REQUIRED, "language_config": {}, "tile_tag": "2D"}
    settings = with_defaults(config, defaults, where)
    check_supported(settings, {"tile_tag": ("2D",)}, where)
    vit = vision_tower(settings["vision_config"], f"{where}.vision_config", **dtypes)
    section = with_defaults(settings["projector_config"], PROJECTOR_DEFAULTS, f"{where}.projector_config")
    check_supported(section, {"token_pooling": (False,)}, f"{where}.projector_config")
    connector, projector = mlp_projector(section, f"{where}.projector_config", source="projector", **dtypes)
    rules = (
        *prefixed(vit_rules(num_patches=num_patches(vit), width=vit.width), "vision.", "encoder/"),
        *prefixed(projector, target="connector/"),
    )
    visual = visual_half(vit, connector, image_shape(vit, 3), rules, UNUSED)
    return with_language(
        visual,
        {"model_type": "deepseek_v2", **settings["language_config"]},
        checkpoint,
        f"{where}.language_config",
        names=Names("language.model.", "language."),
        beside=BESIDE,
        learned_rows=LEARNED_ROWS,
        **dtypes,
    )


def vision_tower(config: Config, where: str, **fields: Any) -> ViT:
    """The ViT of a `VisionEncoderConfig`, whose blocks are all used.

    Args:
      config: the released section.
      where: name of the section for errors.
      **fields: more fields of `ViT`.
    """
    settings = with_defaults(config, VISION_DEFAULTS, where)
    check_supported(settings, {"class_token": (False,)}, where)
    side = settings["image_size"]
    return ViT(
        image_size=(side, side),
        patch_size=settings["patch_size"],
        width=settings["width"],
        depth=settings["layers"],
        num_heads=settings["heads"],
        mlp_dim=int(settings["width"] * settings["mlp_ratio"]),
        activation="gelu_tanh",
        norm_epsilon=1e-6,
        **fields,
    )

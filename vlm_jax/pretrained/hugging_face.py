"""What configs of transformers call alike in every family."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.pretrained.family import ACTIVATIONS, check_supported, one_side


def block_fields(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Sizes, activation and epsilon of the blocks, as fields of `Trunk` and of `TextTower`.

    Args:
      settings: a section with its defaults in place.
      where: names the section in messages.

    Raises:
      PretrainedError: an activation that is not computed here.
    """
    check_supported(settings, {"hidden_act": tuple(ACTIVATIONS)}, where)
    return {
        "width": settings["hidden_size"],
        "depth": settings["num_hidden_layers"],
        "num_heads": settings["num_attention_heads"],
        "mlp_dim": settings["intermediate_size"],
        "activation": ACTIVATIONS[settings["hidden_act"]],
        "norm_epsilon": settings["layer_norm_eps"],
    }


def vit_fields(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Those of a ViT with a learned table of positions, which transformers interpolates bicubically.

    Raises:
      PretrainedError: as of `block_fields`; images or patches that are not square.
    """
    side = one_side(settings["image_size"], f"{where}.image_size")
    return {
        **block_fields(settings, where),
        "image_size": (side, side),
        "patch_size": one_side(settings["patch_size"], f"{where}.patch_size"),
        "position_interpolation": "bicubic",
    }

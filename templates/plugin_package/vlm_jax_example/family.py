"""A vision tower under names of its own: config.json with model_type plain_vit, and safetensors."""

from collections.abc import Mapping

from vlm_jax.checkpoints.maps.torch_layers import conv, layer_norm, linear
from vlm_jax.checkpoints.rules import Rule, SourceTensor
from vlm_jax.encoders.vit import ViT
from vlm_jax.pretrained.family import REQUIRED, Description, check_supported, with_defaults
from vlm_jax.pretrained.tables import image_shape
from vlm_jax.types import Config, Dtype

# Every key of the released config, with the default that its own loader has for a missing one.
DEFAULTS = {
    "width": REQUIRED,
    "depth": REQUIRED,
    "num_heads": REQUIRED,
    "mlp_ratio": 4,
    "image_size": 224,
    "patch_size": 16,
    "activation": "gelu",
}


def rules() -> tuple[Rule, ...]:
    """The names of the tensors in the released file, and the parameters that they are.

    `{layer}` stands for the number of a layer; all layers are stacked in one parameter.
    """
    block, target = "blocks.{layer}", "blocks/layers"
    table = [
        Rule("positions", "positions/table"),
        *conv("patches", "patch_embed", bias=True),
        *layer_norm("norm", "final_norm"),
        *layer_norm(f"{block}.norm1", f"{target}/attention_norm"),
        *layer_norm(f"{block}.norm2", f"{target}/mlp_norm"),
        *linear(f"{block}.fc1", f"{target}/mlp/up"),
        *linear(f"{block}.fc2", f"{target}/mlp/down"),
    ]
    for name in ("query", "key", "value", "out"):
        table += linear(f"{block}.{name}", f"{target}/attention/{name}")
    return tuple(table)


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """The tower of a released config, and its rules."""
    del checkpoint  # all that is needed is in the config
    settings = with_defaults(config, DEFAULTS, "config.json")
    check_supported(settings, {"activation": ("gelu",)}, "config.json")
    tower = ViT(
        image_size=(settings["image_size"], settings["image_size"]),
        patch_size=settings["patch_size"],
        width=settings["width"],
        depth=settings["depth"],
        num_heads=settings["num_heads"],
        mlp_dim=settings["mlp_ratio"] * settings["width"],
        dtype=dtype,
        param_dtype=param_dtype,
    )
    return Description(tower, (image_shape(tower, 3),), rules())

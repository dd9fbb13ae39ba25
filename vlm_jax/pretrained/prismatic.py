"""Prismatic and OpenVLA in the format of their releases: one or two towers of timm, the projector, Llama or Mistral."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.maps.timm import vit_rules
from vlm_jax.checkpoints.maps.torch_layers import linear
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.config import ConfigError, check_keys, convert, did_you_mean, hints_of
from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.encoders.hybrid import Hybrid
from vlm_jax.encoders.vit import ViT
from vlm_jax.layers.mlp import ACTIVATIONS
from vlm_jax.pretrained.composition import text_section, visual_half, with_language
from vlm_jax.pretrained.family import Description, Names, PretrainedError, check_supported, with_defaults
from vlm_jax.pretrained.tables import left_out, num_patches
from vlm_jax.types import Config, Dtype, Fields

# The config has the names of its towers in timm, whose code has their sizes: models/vision_transformer.py of 0.9.16.
_LARGE: Fields = {
    "width": 1024,
    "depth": 24,
    "num_heads": 16,
    "mlp_dim": 4096,
    "activation": "gelu",
    "class_token": True,
}
_DINOV2: Fields = {**_LARGE, "patch_size": 14, "num_registers": 4, "layer_scale": 1e-5}
_SO400M: Fields = {
    "patch_size": 14,
    "width": 1152,
    "depth": 27,
    "num_heads": 16,
    "mlp_dim": 4304,
    "activation": "gelu",
}
_CLIP: Fields = {
    **_LARGE,
    "patch_size": 14,
    "class_position": True,
    "pre_norm": True,
    "patch_bias": False,
    "norm_epsilon": 1e-5,
}
# Name in timm -> fields of `ViT`.
MODELS: dict[str, Fields] = {
    "vit_large_patch14_clip_224.openai": _CLIP,
    "vit_large_patch14_clip_336.openai": _CLIP,
    "vit_large_patch14_reg4_dinov2.lvd142m": _DINOV2,
    "vit_large_patch16_224.augreg_in21k_ft_in1k": {**_LARGE, "patch_size": 16, "class_position": True},
    "vit_so400m_patch14_siglip_224": _SO400M,
    "vit_so400m_patch14_siglip_384": _SO400M,
}
# prismatic/extern/hf/configuration_prismatic.py: of each `vision_backbone_id` the towers, and the side of their images.
BACKBONES: dict[str, tuple[tuple[str, ...], int]] = {
    "clip-vit-l": (("vit_large_patch14_clip_224.openai",), 224),
    "clip-vit-l-336px": (("vit_large_patch14_clip_336.openai",), 336),
    "dinoclip-vit-l-336px": (("vit_large_patch14_reg4_dinov2.lvd142m", "vit_large_patch14_clip_336.openai"), 336),
    "dinosiglip-vit-so-224px": (("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"), 224),
    "dinosiglip-vit-so-384px": (("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384"), 384),
    "dinov2-vit-l": (("vit_large_patch14_reg4_dinov2.lvd142m",), 224),
    "in1k-vit-l": (("vit_large_patch16_224.augreg_in21k_ft_in1k",), 224),
    "siglip-vit-so400m": (("vit_so400m_patch14_siglip_224",), 224),
    "siglip-vit-so400m-384px": (("vit_so400m_patch14_siglip_384",), 384),
}
DEFAULTS: Fields = {"vision_backbone_id": "siglip-vit-so400m", "llm_backbone_id": "vicuna-v15-7b"}
# Beginning of an `llm_backbone_id` -> the model type of the language model, and its width without a `hidden_size`.
LANGUAGES = {"llama2": ("llama", 4096), "vicuna": ("llama", 4096), "mistral": ("mistral", 4096), "phi": ("phi", 2048)}
FEATURIZERS = ("featurizer", "fused_featurizer")
_CLIP_ACTIVATION = "quick_gelu"
_LAYER_SCALE = "scale_factor"  # timm's `gamma`, which transformers would rename
# timm makes these, and nothing reads them.
UNUSED = (r"vision_backbone\.(fused_)?featurizer\.(norm|fc_norm|attn_pool|head)\..*",)
NOT_VISION = (r"language_model\..*",)


class Tower(NamedTuple):
    """A tower of a config.

    Attributes:
      name: in timm.
      side: of its images, in pixels.
      activation: of its feed-forwards, in place of timm's; None for that.
    """

    name: str
    side: int
    activation: str | None


def towers(config: Config, where: str) -> tuple[Tower, ...]:
    """The one or two towers of a config.

    Raises:
      PretrainedError: an unknown `vision_backbone_id` without the keys that it stands for, or a number of towers, sizes
        or activations that do not fit each other.
    """
    settings = with_defaults(config, DEFAULTS, where)
    backbone = settings["vision_backbone_id"]
    if backbone not in BACKBONES and not all(config.get(key) for key in ("timm_model_ids", "image_sizes")):
        raise PretrainedError(f"{where}.vision_backbone_id: unknown '{backbone}'{did_you_mean(backbone, BACKBONES)}")
    known, side = BACKBONES.get(backbone, ((), 0))
    names = config.get("timm_model_ids") or known
    sizes = config.get("image_sizes") or [side] * len(names)
    acts = config.get("timm_override_act_layers")
    if acts is None:
        acts = [_CLIP_ACTIVATION if "clip" in name.split("_") else None for name in names]
    fused = config.get("use_fused_vision_backbone")
    fused = backbone.startswith(("dinoclip", "dinosiglip")) if fused is None else fused
    count = 2 if fused else 1
    for key, given in (("timm_model_ids", names), ("image_sizes", sizes), ("timm_override_act_layers", acts)):
        if len(given) != count:
            raise PretrainedError(
                f"{where}.{key}: expected {count} where use_fused_vision_backbone is {str(fused).lower()}, got "
                f"{given!r}"
            )
    if len(set(sizes)) > 1:
        raise PretrainedError(f"{where}.image_sizes: expected one size for both towers, got {sizes!r}")
    return tuple(Tower(*one) for one in zip(names, sizes, acts, strict=True))


def sizes_of(name: str, config: Config, where: str) -> Fields:
    """Fields of `ViT` of a name in timm: of `MODELS`, or of the key `model_registry` of the config.

    Raises:
      PretrainedError: an unknown name, or fields that `ViT` does not have.
    """
    registry: dict[str, Any] = {**MODELS, **config.get("model_registry", {})}
    if name not in registry:
        raise PretrainedError(
            f"{where}.timm_model_ids: no sizes of '{name}' are known{did_you_mean(name, registry)}; add them, as "
            "fields of ViT, under model_registry"
        )
    place, hints = f"{where}.model_registry.{name}", hints_of(ViT)
    try:
        check_keys(registry[name], hints, place)
        return {key: convert(value, hints[key], f"{place}.{key}") for key, value in registry[name].items()}
    except ConfigError as error:
        raise PretrainedError(str(error)) from error


def language_of(config: Config, where: str) -> tuple[str, int]:
    """The default model type of the language model, and the default of its width.

    Raises:
      PretrainedError: an unknown `llm_backbone_id`.
    """
    name = with_defaults(config, DEFAULTS, where)["llm_backbone_id"]
    known = next((found for prefix, found in LANGUAGES.items() if name.startswith(prefix)), None)
    if known is None:
        raise PretrainedError(f"{where}.llm_backbone_id: expected a name of {', '.join(LANGUAGES)}, got {name!r}")
    return known


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `PrismaticForConditionalGeneration`, or an `OpenVLAForActionPrediction`, whose actions are its last words.

    Features are the patches' of the second-to-last block, without a norm; those of two towers are joined by channels.
    """
    where, dtypes = config["model_type"], {"dtype": dtype, "param_dtype": param_dtype}
    found = towers(config, where)
    made = [_tower(tower, config, where, dtypes) for tower in found]
    encoder: ViT | Hybrid = made[0]
    rules = [_rules(vit, FEATURIZERS[number]) for number, vit in enumerate(made)]
    ignore = [UNUSED[0], *(key for n, vit in enumerate(made) for key in left_out(vit, f"{_prefix(n)}blocks."))]
    kind, width = language_of(config, where)
    text = text_section(config, checkpoint, kind=kind, tied=False)
    width = with_defaults(text, {"hidden_size": width}, f"{where}.text_config")["hidden_size"]
    connector, names = MlpConnector(width, **dtypes), ("up", "down")
    if len(made) == 1:
        own = prefixed(rules[0], target="encoder/")
    else:
        encoder = Hybrid(*made, low_size=found[0].side, combine="feature")
        if made[0].grid(*(found[0].side,) * 2) != made[1].grid(*(found[1].side,) * 2):
            raise PretrainedError(
                f"{where}.timm_model_ids: expected two towers with the same grid of patches, got patches of "
                f"{made[0].patch_size} and {made[1].patch_size} pixels"
            )
        own = (*prefixed(rules[0], target="encoder/high/"), *prefixed(rules[1], target="encoder/low/"))
        connector = connector.clone(depth=3, first_dim=4 * encoder.features)
        names = ("up", "middle_0", "down")
    layers: Sequence[Rule] = [
        rule
        for number, name in enumerate(names, 1)
        for rule in linear(f"projector.fc{number}", f"connector/mlp/{name}")
    ]
    pixels = jax.ShapeDtypeStruct((1, found[0].side, found[0].side, 3), jnp.float32)
    visual = visual_half(encoder, connector, pixels, (*own, *layers), tuple(ignore))
    language = Names("language_model.model.", "language_model.")
    return with_language(visual, text, checkpoint, f"{where}.text_config", names=language, beside=NOT_VISION, **dtypes)


def _tower(tower: Tower, config: Config, where: str, dtypes: Fields) -> ViT:
    fields = sizes_of(tower.name, config, where)
    if missing := [key for key in ("patch_size", "width", "depth", "num_heads", "mlp_dim") if key not in fields]:
        raise PretrainedError(f"{where}.model_registry.{tower.name}: expected the keys {', '.join(missing)}, not found")
    if tower.side < fields["patch_size"]:
        raise PretrainedError(
            f"{where}.image_sizes: expected at least a patch, {fields['patch_size']}, got {tower.side}"
        )
    if tower.activation is not None:
        check_supported(
            {"timm_override_act_layers": tower.activation}, {"timm_override_act_layers": tuple(ACTIVATIONS)}, where
        )
        fields = {**fields, "activation": tower.activation}
    return ViT(**{**fields, "image_size": (tower.side, tower.side), "select_layer": -2, **dtypes})


def _prefix(number: int) -> str:
    return f"vision_backbone.{FEATURIZERS[number]}."


def _rules(vit: ViT, featurizer: str) -> tuple[Rule, ...]:
    rules = vit_rules(
        width=vit.width,
        num_patches=num_patches(vit),
        class_token=vit.class_token,
        class_position=vit.class_position,
        num_registers=vit.num_registers,
        pre_norm=vit.pre_norm,
        patch_bias=vit.patch_bias,
        layer_scale=None if vit.layer_scale is None else _LAYER_SCALE,
        final_norm=False,
    )
    return prefixed(rules, f"vision_backbone.{featurizer}.")

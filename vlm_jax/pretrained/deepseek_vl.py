"""DeepSeek-VL in the format of its release: SigLIP, or SAM and SigLIP, the projector and Llama."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.maps.deepseek_vl import hybrid_rules, sam_rules
from vlm_jax.checkpoints.maps.timm import vit_rules
from vlm_jax.checkpoints.rules import Rule, SourceTensor, prefixed
from vlm_jax.config import did_you_mean
from vlm_jax.encoders.hybrid import Hybrid
from vlm_jax.encoders.sam import SAM
from vlm_jax.encoders.vit import ViT
from vlm_jax.pretrained.composition import visual_half, with_language
from vlm_jax.pretrained.family import REQUIRED, Description, Names, PretrainedError, check_supported, with_defaults
from vlm_jax.pretrained.projector import mlp_projector
from vlm_jax.pretrained.sam import stacks
from vlm_jax.pretrained.tables import num_patches
from vlm_jax.types import Config, Dtype, Fields, Grid, Params

# The release's config has the names of its towers, its code their sizes: models/siglip_vit.py and models/sam.py.
MODELS: dict[str, Fields] = {
    "siglip_so400m_patch14_384": {
        "patch_size": 14,
        "width": 1152,
        "layers": 27,
        "heads": 16,
        "mlp_ratio": 3.7362,
    },
    "siglip_so400m_patch14_224": {
        "patch_size": 14,
        "width": 1152,
        "layers": 27,
        "heads": 16,
        "mlp_ratio": 3.7362,
    },
    "siglip_large_patch16_384": {"patch_size": 16, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4},
    "sam_vit_b": {"width": 768, "layers": 12, "heads": 12, "global_attn_indexes": [2, 5, 8, 11]},
    "sam_b_downsample": {
        "width": 768,
        "layers": 12,
        "heads": 12,
        "global_attn_indexes": [2, 5, 8, 11],
        "downsample_channels": [512, 1024],
    },
    "sam_vit_l": {"width": 1024, "layers": 24, "heads": 16, "global_attn_indexes": [5, 11, 17, 23]},
    "sam_vit_h": {"width": 1280, "layers": 32, "heads": 16, "global_attn_indexes": [7, 15, 23, 31]},
}
SAM_DEFAULTS = {
    "patch_size": 16,
    "prompt_embed_dim": 256,
    "downsample_channels": [],
    "window_size": 14,
    "mlp_ratio": 4,
}
# models/sam.py resizes the neck's output to this for any image size.
DOWNSAMPLE_FROM = (96, 96)
COMBINE = {"feature": "feature", "sequence": "sequence", "add": "sum", "tuple": "tuple"}
NOT_VISION = (r"language_model\..*",)
# models/clip_encoder.py and timm create these and never use them.
UNUSED = (r"vision_model\.(high|low)_layer_norm\..*", r"vision_model\.(.*\.)?vision_tower\.attn_pool\..*")


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `MultiModalityCausalLM`, whose language model is a Llama.

    A tower's sizes are in `MODELS` under its `model_name`; the key `model_registry` of the config,
    which no release has, adds or replaces entries.
    """
    section = with_defaults(config.get("vision_config", {}), {"cls": REQUIRED, "params": REQUIRED}, "vision_config")
    check_supported(section, {"cls": ("CLIPVisionTower", "HybridVisionTower")}, "vision_config")
    params, dtypes = section["params"], {"dtype": dtype, "param_dtype": param_dtype}
    registry = {**MODELS, **config.get("model_registry", {})}
    if section["cls"] == "CLIPVisionTower":
        # Done by the processor; only the hybrid tower, with two different normalisations, does it itself.
        unused = {"pixel_mean": (None,), "pixel_std": (None,)}
        check_supported(params, unused, "vision_config.params")
        encoder, rules, image_size = _tower(params, registry, "vision_config.params", dtypes)
        rules = prefixed(rules, "vision_model.vision_tower.")
    else:
        encoder, rules, image_size = _hybrid(params, registry, dtypes)
    aligner = with_defaults(config.get("aligner_config", {}), {"cls": REQUIRED, "params": REQUIRED}, "aligner_config")
    check_supported(aligner, {"cls": ("MlpProjector",)}, "aligner_config")
    connector, projector = mlp_projector(aligner["params"], "aligner_config.params", source="aligner", **dtypes)
    pixels = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    rules = (*prefixed(rules, target="encoder/"), *prefixed(projector, target="connector/"))
    visual = visual_half(encoder, connector, pixels, rules, UNUSED)
    text, names = config.get("language_config", {}), Names("language_model.model.", "language_model.")
    text = {"model_type": "llama", **text}
    return with_language(visual, text, checkpoint, "language_config", names=names, beside=NOT_VISION, **dtypes)


def _hybrid(params: Params, registry: Config, dtypes: dict) -> tuple[Hybrid, tuple[Rule, ...], Grid]:
    where = "vision_config.params"
    defaults = {"high_res_cfg": REQUIRED, "low_res_cfg": REQUIRED, "concat_type": "tuple"}
    params = with_defaults(params, defaults, where)
    check_supported(params, {"concat_type": tuple(COMBINE)}, where)
    high, high_rules, high_size = _tower(params["high_res_cfg"], registry, f"{where}.high_res_cfg", dtypes)
    low, low_rules, low_size = _tower(params["low_res_cfg"], registry, f"{where}.low_res_cfg", dtypes)
    module = Hybrid(
        high=high,
        low=low,
        low_size=min(low_size),
        combine=COMBINE[params["concat_type"]],  # type: ignore[arg-type]
        high_statistics=_statistics(params["high_res_cfg"]),
        low_statistics=_statistics(params["low_res_cfg"]),
    )
    return module, hybrid_rules(high_rules, low_rules), high_size


def _tower(settings: Config, registry: Config, where: str, dtypes: dict) -> tuple[ViT | SAM, tuple[Rule, ...], Grid]:
    """A `CLIPVisionTower`: its module, its rules without a prefix, and (height, width) of its images."""
    defaults = {"model_name": REQUIRED, "image_size": REQUIRED, "select_layer": -2, "select_feature": "patch"}
    settings = with_defaults(settings, defaults, where)
    name, size = settings["model_name"], settings["image_size"]
    if name not in registry:
        raise PretrainedError(f"{where}.model_name: unknown '{name}'{did_you_mean(name, registry)}")
    image_size = (size, size) if isinstance(size, int) else tuple(size)
    if name.startswith("sam"):
        check_supported(settings, {"select_feature": ("same",)}, where)
        return *_sam(registry[name], image_size, dtypes), image_size
    return *_siglip(registry[name], image_size, settings["select_layer"], dtypes), image_size


def _siglip(sizes: Config, image_size: tuple[int, int], select_layer: int, dtypes: dict) -> tuple[Any, Any]:
    """A layer is selected by omitting later ones; the last norm is kept."""
    depth = sizes["layers"]
    kept = min(depth, depth + select_layer + 1) if select_layer <= 0 else min(depth, select_layer)
    module = ViT(
        image_size=image_size,
        patch_size=sizes["patch_size"],
        width=sizes["width"],
        depth=kept,
        num_heads=sizes["heads"],
        mlp_dim=int(sizes["width"] * sizes["mlp_ratio"]),
        activation="gelu",
        norm_epsilon=1e-6,
        **dtypes,
    )
    return module, vit_rules(num_patches=num_patches(module), width=module.width)


def _sam(sizes: Config, image_size: tuple[int, int], dtypes: dict) -> tuple[SAM, tuple[Rule, ...]]:
    sizes = {**SAM_DEFAULTS, **sizes}
    module = SAM(
        image_size=image_size,
        patch_size=sizes["patch_size"],
        width=sizes["width"],
        depth=sizes["layers"],
        num_heads=sizes["heads"],
        mlp_dim=int(sizes["width"] * sizes["mlp_ratio"]),
        neck_dim=sizes["prompt_embed_dim"],
        global_blocks=tuple(sizes["global_attn_indexes"]),
        window_size=sizes["window_size"],
        downsample_dims=tuple(sizes["downsample_channels"]),
        downsample_from=DOWNSAMPLE_FROM,
        high_res_branch=True,
        **dtypes,
    )
    rules = sam_rules(
        grid=module.patch_grid(*image_size),
        width=module.width,
        neck_dim=module.neck_dim,
        num_downsamples=len(module.downsample_dims),
        runs=stacks(module),
    )
    return module, rules


def _statistics(settings: Config) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    mean, std = settings.get("pixel_mean"), settings.get("pixel_std")
    return None if mean is None or std is None else (tuple(map(float, mean)), tuple(map(float, std)))

"""DeepSeek-OCR in the format of its release: SAM, CLIP behind it, a linear projector and the language model."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vlm_jax.checkpoints.maps.deepseek_ocr import DOWNSAMPLES, clip_rules, sam_rules
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.encoders.cascade import Cascade
from vlm_jax.encoders.sam import SAM
from vlm_jax.encoders.vit import ViT
from vlm_jax.pretrained.composition import visual_half, with_language
from vlm_jax.pretrained.family import REQUIRED, Description, Names, PretrainedError, check_supported, with_defaults
from vlm_jax.pretrained.projector import mlp_projector
from vlm_jax.pretrained.sam import stacks
from vlm_jax.released_json import shown
from vlm_jax.types import Config, Dtype, Fields

WHERE = "deepseek_ocr"
# deepencoder.py: build_sam_vit_b and vit_model_cfg; `image_size` of SAM is that of its position table.
SAM_NAME, CLIP_NAME = "sam_vit_b", "clip-l-14-224"
VISION_DEFAULTS: Fields = {"image_size": 1024, "model_name": "deeplip_b_l", "width": REQUIRED}
SAM_DEFAULTS: Fields = {
    "width": 768,
    "layers": 12,
    "heads": 12,
    "global_attn_indexes": [2, 5, 8, 11],
    "downsample_channels": [512, 1024],
}
CLIP_DEFAULTS: Fields = {"width": 1024, "layers": 24, "heads": 16, "image_size": 224, "patch_size": 14}
PATCH_SIZE, WINDOW_SIZE, MLP_RATIO, NECK_DIM = 16, 14, 4, 256
NECK_KEY = "model.sam_model.neck.0.weight"
PROJECTOR_DEFAULTS: Fields = {"projector_type": "linear", "input_dim": 2048, "n_embed": 1280}
LEARNED_ROWS = {"image_newline": "model.image_newline", "view_separator": "model.view_seperator"}
LANGUAGE = (r"lm_head\..*", r"model\.(embed_tokens|layers|norm)\..*")
UNUSED = (
    r"model\.vision_model\.embeddings\.(patch_embedding\.weight|position_ids)",  # the patches are SAM's features
)


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A `DeepseekOCRForCausalLM`, whose settings of the language model are in the config itself."""
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    settings = with_defaults(config, {"vision_config": REQUIRED, "projector_config": {}, "tile_tag": "2D"}, WHERE)
    check_supported(settings, {"tile_tag": ("2D",)}, WHERE)
    vision = with_defaults(settings["vision_config"], VISION_DEFAULTS, f"{WHERE}.vision_config")
    check_supported(vision, {"model_name": ("deeplip_b_l",)}, f"{WHERE}.vision_config")
    if not isinstance(vision["width"], Mapping) or None in vision["width"].values():
        raise PretrainedError(
            f"{WHERE}.vision_config.width: expected an object with the sizes of {SAM_NAME} and {CLIP_NAME}, got "
            f"{shown(vision['width'])}"
        )
    first, second = _sam(vision, checkpoint, dtypes), _clip(vision, dtypes)
    if first.features != second.width:
        raise PretrainedError(
            f"{WHERE}.vision_config.width: {CLIP_NAME} takes the features of {SAM_NAME} as its patches; expected "
            f"width {second.width} as the last of downsample_channels, got {first.features}"
        )
    section = with_defaults(settings["projector_config"], PROJECTOR_DEFAULTS, f"{WHERE}.projector_config")
    check_supported(section, {"projector_type": ("linear",)}, f"{WHERE}.projector_config")
    connector, projector = mlp_projector(section, f"{WHERE}.projector_config", source="model.projector", **dtypes)
    grid = first.patch_grid(*first.image_size)
    of_sam = sam_rules(grid=grid, width=first.width, neck_dim=first.neck_dim, runs=stacks(first))
    of_clip = clip_rules(width=second.width, num_patches=_table_side(vision) ** 2)
    rules = (
        *prefixed(of_sam, "model.sam_model.", "encoder/first/"),
        *prefixed(of_clip, "model.vision_model.", "encoder/second/"),
        *prefixed(projector, target="connector/"),
    )
    pixels = jax.ShapeDtypeStruct((1, *first.image_size, 3), jnp.float32)
    has_language = any(key.startswith("model.embed_tokens.") for key in checkpoint)
    unused = UNUSED if has_language else (*UNUSED, *LEARNED_ROWS.values())
    visual = visual_half(Cascade(first, second), connector, pixels, rules, unused)
    return with_language(
        visual,
        {**config.get("language_config", {}), **config, "model_type": "deepseek_v2"},
        checkpoint,
        WHERE,
        names=Names("model.", ""),
        beside=LANGUAGE,
        learned_rows=LEARNED_ROWS,
        **dtypes,
    )


def _sam(vision: Fields, checkpoint: Mapping[str, SourceTensor], dtypes: Fields) -> SAM:
    where = f"{WHERE}.vision_config.width.{SAM_NAME}"
    sizes = with_defaults(vision["width"].get(SAM_NAME, {}), SAM_DEFAULTS, where)
    channels = sizes["downsample_channels"]
    channels = tuple(SAM_DEFAULTS["downsample_channels"] if channels is None else channels)
    if len(channels) != len(DOWNSAMPLES):
        raise PretrainedError(f"{where}.downsample_channels: expected {len(DOWNSAMPLES)} numbers, got {list(channels)}")
    neck = checkpoint.get(NECK_KEY)  # whose channels the config does not have
    return SAM(
        image_size=(vision["image_size"],) * 2,
        patch_size=PATCH_SIZE,
        width=sizes["width"],
        depth=sizes["layers"],
        num_heads=sizes["heads"],
        mlp_dim=MLP_RATIO * sizes["width"],
        neck_dim=NECK_DIM if neck is None else neck.shape[0],
        global_blocks=tuple(sizes["global_attn_indexes"]),
        window_size=WINDOW_SIZE,
        downsample_dims=channels,
        **dtypes,
    )


def _clip(vision: Fields, dtypes: Fields) -> ViT:
    sizes = with_defaults(vision["width"].get(CLIP_NAME, {}), CLIP_DEFAULTS, f"{WHERE}.vision_config.width.{CLIP_NAME}")
    side = _table_side(vision)
    return ViT(
        image_size=(side, side),
        patch_size=1,
        embeds_patches=False,
        width=sizes["width"],
        depth=sizes["layers"],
        num_heads=sizes["heads"],
        mlp_dim=MLP_RATIO * sizes["width"],
        activation="quick_gelu",
        norm_epsilon=1e-5,
        class_token=True,
        class_position=True,
        pre_norm=True,
        final_norm="none",
        **dtypes,
    )


def _table_side(vision: Fields) -> int:
    """Side of CLIP's position table, in patches of its own images."""
    sizes = {**CLIP_DEFAULTS, **vision["width"].get(CLIP_NAME, {})}
    return sizes["image_size"] // sizes["patch_size"]

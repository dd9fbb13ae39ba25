"""DeepSeek-OCR in the format of its release: its modes, of which `infer` takes the one with tiles unless told."""

import dataclasses
import math

from vlm_jax.pretrained.deepseek_ocr import PATCH_SIZE, VISION_DEFAULTS
from vlm_jax.pretrained.family import PretrainedError, check_supported, with_defaults
from vlm_jax.pretrained.processing.settings import COMMON, Folder, end_of_text, pixels, processor_settings
from vlm_jax.processors.mosaic import Mosaic, MosaicViews
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.spelled_prompt import UnmarkedPrompt
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Config, Fields

# The arguments of `infer`, which no file of the release has: a folder may have them in processor_config.json.
DEFAULTS: Fields = {
    "base_size": None,
    "image_size": None,
    "crop_mode": True,
    "min_crops": 2,
    "max_crops": 9,
    "crop_threshold": 640,
    "patch_size": PATCH_SIZE,
    "downsample_ratio": 4,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "normalize": True,
    "image_token": "<image>",
    "pad_token": "<｜▁pad▁｜>",
    "add_special_token": False,
}
SUPPORTED: Fields = {"add_special_token": (False,), "patch_size": (PATCH_SIZE,)}
STRETCHED = 640  # without crops, images of at most this side are stretched, and larger ones padded
# Sides of the modes without crops, tiny to large, as shares of SAM's training size; then that of a crop.
MODES, CROP = (1 / 2, 5 / 8, 1, 5 / 4), 5 / 8


def processor(folder: Folder, config: Config) -> Processor:
    """The release's processor."""
    where = f"{folder}: processor_config.json"
    settings = with_defaults(processor_settings(folder), DEFAULTS, where)
    check_supported(settings, SUPPORTED, where)
    return unmarked(folder, settings, views(folder, config), num_learned=2)


def unmarked(folder: Folder, settings: Config, own_views: MosaicViews, *, num_learned: int) -> Processor:
    """A processor of conversations without names of roles.

    Args:
      folder: with the tokenizer.
      settings: those of the processor, with `DEFAULTS`.
      own_views: of the release.
      num_learned: learned rows of the views.
    """
    tokenizer = Tokenizer.from_folder(folder)
    prompt = UnmarkedPrompt(tokenizer, settings["image_token"])
    pad, ends = tokenizer.id_of(settings["pad_token"]), end_of_text(tokenizer)
    return Processor(prompt, own_views, tokenizer, pad, num_learned=num_learned, end_tokens=ends)


def views(folder: Folder, config: Config) -> MosaicViews:
    """The release's views: those of its mode with tiles, unless the folder states others."""
    settings = with_defaults(processor_settings(folder), DEFAULTS, f"{folder}: processor_config.json")
    of_table = {"image_size": VISION_DEFAULTS["image_size"]}
    full = with_defaults(config.get("vision_config", {}), of_table, "deepseek_ocr.vision_config")["image_size"]
    of_pixels = pixels({**COMMON, **settings, "do_normalize": settings["normalize"]})
    base, crop = settings["base_size"] or full, settings["image_size"] or int(CROP * full)
    options = {key: settings[key] for key in ("min_crops", "max_crops", "crop_threshold", "downsample_ratio")}
    chosen = mode(of_pixels, base, crop, settings["crop_mode"], **options)
    sides = [int(share * full) for share in MODES]
    others = [
        mode(of_pixels, side, side, False, stretched=share * VISION_DEFAULTS["image_size"] <= STRETCHED, **options)
        for share, side in zip(MODES, sides, strict=True)
        if side >= PATCH_SIZE
    ]
    return dataclasses.replace(chosen, modes=tuple(others))


def mode(
    of_pixels: Pixels,
    base_size: int,
    image_size: int,
    crop_mode: bool,
    *,
    min_crops: int = 2,
    max_crops: int = 9,
    crop_threshold: int = 640,
    downsample_ratio: int = 4,
    stretched: bool | None = None,
) -> MosaicViews:
    """The views of a mode.

    Args:
      of_pixels: resizing and normalisation.
      base_size: side of the view of the whole, in pixels.
      image_size: that of a crop; without crops, that of the image.
      crop_mode: whether large images are cut.
      min_crops, max_crops: of such an image.
      crop_threshold: an image whose sides are both at most this, in pixels, is not cut.
      downsample_ratio: side in patches of the square that a token stands for.
      stretched: whether the whole is stretched; by its size when None.

    Raises:
      PretrainedError: a size without a token.
    """

    def tokens(side: int) -> tuple[int, int]:
        count = math.ceil(side // PATCH_SIZE / downsample_ratio)
        if not count:
            raise PretrainedError(f"base_size and image_size: expected at least {PATCH_SIZE} pixels, got {side}")
        return count, count

    if not crop_mode:
        stretched = image_size <= STRETCHED if stretched is None else stretched
        return MosaicViews(of_pixels, image_size, tokens(image_size), stretched=stretched)
    mosaic = Mosaic(image_size, tokens(image_size), min_crops, max_crops, crop_threshold)
    return MosaicViews(of_pixels, base_size, tokens(base_size), mosaic=mosaic)

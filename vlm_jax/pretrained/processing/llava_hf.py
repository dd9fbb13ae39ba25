"""LLaVA, LLaVA-NeXT and LLaVA-OneVision in the format of transformers."""

import dataclasses
import math
from typing import Any

from vlm_jax.pretrained.clip import VISION_DEFAULTS as CLIP_DEFAULTS
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.llava_hf import full_settings, keeps_class_token
from vlm_jax.pretrained.processing.settings import (
    Folder,
    canvas_sizes,
    height_and_width,
    image_settings,
    pad_id,
    processor_settings,
    square_views,
    video_pixels,
    video_settings,
)
from vlm_jax.pretrained.siglip import VISION_DEFAULTS as SIGLIP_DEFAULTS
from vlm_jax.processors.anyres import AnyresViews
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.learned import Learned
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import Kind, TemplatePrompt
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.video import EveryFrame, FrameSampler, RateSampler
from vlm_jax.processors.views import Views
from vlm_jax.types import Config, Fields, Grid

# transformers, models/llava/image_processing_llava.py and models/llava_next/image_processing_llava_next.py.
DEFAULTS: Fields = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_pad": False,
}
# LLaVA-VL/LLaVA-NeXT, llava/train/train.py, preprocess_qwen: tags and newlines of all turns, heads of answers.
LEARNED_QWEN = Learned(
    end="<|im_end|>\n", tokens=("<|im_start|>", "<|im_end|>", "\n"), head=True, images_first="single"
)
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# models/llava_onevision: image_processing_llava_onevision.py, video_processing_llava_onevision.py and configuration.
ONEVISION: Fields = {
    "size": {"height": 384, "width": 384},
    "do_center_crop": False,
    "image_grid_pinpoints": [[384 * down, 384 * across] for down in range(1, 7) for across in range(1, 7)],
}
ASPECT = "anyres_max_9"


def processor(folder: Folder, config: Config) -> Processor:
    """LLaVA's processor."""
    return _processor(folder, config, views(folder, config))


def processor_next(folder: Folder, config: Config) -> Processor:
    """LLaVA-NeXT's processor, with tiles."""
    return _processor(folder, config, views_next(folder, config), num_learned=1)


def views(folder: Folder, config: Config) -> SquareViews:
    """LLaVA's views."""
    return _square(folder, config)[0]


def views_next(folder: Folder, config: Config) -> AnyresViews:
    """LLaVA-NeXT's views, with tiles."""
    base, grid = _square(folder, config)
    settings = image_settings(folder, {**DEFAULTS, "image_grid_pinpoints": PINPOINTS})
    side, where = base.size[0], f"{folder}: image processor: image_grid_pinpoints"
    canvases = tuple((down, across) for across, down in canvas_sizes(settings["image_grid_pinpoints"], side, where))
    return AnyresViews(base, grid, canvases, side=side, port=True)


def processor_onevision(folder: Folder, config: Config) -> Processor:
    """LLaVA-OneVision's processor."""
    sampler = _sampler(video_settings(folder))
    return _processor(folder, config, views_onevision(folder, config), num_learned=1, frame_sampler=sampler)


def views_onevision(folder: Folder, config: Config) -> AnyresViews:
    """LLaVA-OneVision's views: tiles of a single image, several as one tile each, and pooled frames of videos.

    Raises:
      PretrainedError: settings of the files contradict those of the model.
    """
    settings, where = image_settings(folder, ONEVISION), f"{folder}: image processor"
    base, frames = _one_tile(settings, where), _one_tile({**settings, **video_settings(folder)}, where)
    if frames.size != base.size:
        raise PretrainedError(
            f"{folder}: video processor: size: expected that of images, {base.size}, got {frames.size}"
        )
    whole, grid = _grid(base, config)
    _check_no_class_token(whole, where)
    side, given = base.size[0], settings["image_grid_pinpoints"]
    canvases = canvas_sizes(given, side, f"{where}: image_grid_pinpoints")
    return AnyresViews(
        base,
        grid,
        tuple((down, across) for across, down in canvases),
        side=side,
        port=True,
        max_tiles=_max_tiles(folder, config),
        max_tiled=1,
        single=dataclasses.replace(base, fit="pad"),
        frames=dataclasses.replace(frames, pixels=video_pixels(folder, settings)),
    )


def _one_tile(settings: Config, where: str) -> SquareViews:
    """Views of one tile; a shortest edge without a crop is the side of a square, which tiles are already."""
    if not settings["do_center_crop"]:
        size = dict(zip(("height", "width"), height_and_width(settings["size"], f"{where}: size"), strict=True))
        settings = {**settings, "size": size}
    return square_views(settings, where, edge=True)


def _max_tiles(folder: Folder, config: Config) -> int:
    """N of `anyres_max_N`, by the files of the processor and the model."""
    of_model = config.get("vision_aspect_ratio", ASPECT)
    name = processor_settings(folder).get("vision_aspect_ratio", of_model)
    if name != of_model:
        raise PretrainedError(
            f"{folder}: processor: vision_aspect_ratio: expected that of config.json, {of_model!r}, got {name!r}"
        )
    number = name.removeprefix("anyres_max_")
    if number == name or not number.isdecimal() or not 1 <= int(number) <= 1 << 10:
        raise PretrainedError(f"{folder}: vision_aspect_ratio: expected a text such as {ASPECT!r}, got {name!r}")
    return int(number)


def _sampler(videos: Config) -> FrameSampler:
    """Selects frames of video files as the settings of videos state: by default all, as in transformers.

    Source: transformers, video_processing_utils.py, sample_frames; video_processing_llava_onevision.py.
    """
    stated = {"nframes": videos.get("num_frames"), "fps": videos.get("fps")}
    given: Fields = {key: value for key, value in stated.items() if value is not None}
    sampler = RateSampler(**given, min_frames=1, multiple=1, first_of_parts=True)
    return sampler if given and videos.get("do_sample_frames") else EveryFrame(sampler)


def _grid(views: SquareViews, config: Config) -> tuple[bool, Grid]:
    """Whether features start with that of a class token, and the grid of the others."""
    settings = full_settings(config)
    section = settings["vision_config"]
    defaults = CLIP_DEFAULTS if section["model_type"] == "clip_vision_model" else SIGLIP_DEFAULTS
    patch = section.get("patch_size", defaults["patch_size"])
    return keeps_class_token(settings), (views.size[0] // patch, views.size[1] // patch)


def _check_no_class_token(whole: bool, where: str) -> None:
    if whole:
        raise PretrainedError(
            f"{where}: tiles with class tokens are not supported; set vision_feature_select_strategy to 'default'"
        )


def _square(folder: Folder, config: Config) -> tuple[SquareViews, Grid]:
    """Views of one tile, and the grid of its tokens."""
    settings, where = image_settings(folder, DEFAULTS), f"{folder}: image processor"
    views = square_views(settings, where, edge=True)
    whole, grid = _grid(views, config)
    if config["model_type"] == "llava_next":
        _check_no_class_token(whole, where)
    if settings["do_pad"] and config["model_type"] == "llava" and views.fit == "crop":
        views = dataclasses.replace(views, fit="pad")
    return dataclasses.replace(views, num_tokens=math.prod(grid) + whole), grid


def _processor(folder: Folder, config: Config, views: Views, **fields: Any) -> Processor:
    tokenizer, stated = Tokenizer.from_folder(folder), processor_settings(folder)
    kinds: tuple[Kind, ...] = ("image", "video") if config["model_type"] == "llava_onevision" else ("image",)
    # The tokenizer's name takes precedence over the processor's, as in transformers.
    tokens: dict[Kind, str] = {
        kind: tokenizer.names.get(f"{kind}_token") or stated.get(f"{kind}_token") or f"<{kind}>" for kind in kinds
    }
    qwen = config["model_type"] == "llava_next" and config.get("text_config", {}).get("model_type") == "qwen2"
    prompt = TemplatePrompt(
        ChatTemplate.from_folder(folder, tokenizer.names),
        tokenizer,
        marks=tokens,
        tokens=tokens,
        learned=LEARNED_QWEN if qwen else Learned(),
    )
    return Processor(prompt, views, tokenizer, pad_id(tokenizer, config), **fields)

"""LLaVA and LLaVA-NeXT as transformers stores them."""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.processing.settings import (
    Folder,
    height_and_width,
    image_settings,
    mean_colour,
    pad_id,
    pixels,
    processor_settings,
)
from vlm_jax.processors.anyres import AnyresViews
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.system import Processor
from vlm_jax.processors.tokenizer import Tokenizer

# transformers, models/llava/image_processing_llava.py and models/llava_next/image_processing_llava_next.py.
DEFAULTS: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_pad": False,
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def processor(folder: Folder, config: Mapping[str, Any]) -> Processor:
    """LLaVA's."""
    base, _ = _square(folder, config)
    return _processor(folder, config, base)


def processor_next(folder: Folder, config: Mapping[str, Any]) -> Processor:
    """LLaVA-NeXT's, whose pictures are cut into tiles."""
    base, grid = _square(folder, config)
    settings = image_settings(folder, {**DEFAULTS, "image_grid_pinpoints": PINPOINTS})
    canvases = tuple((height, width) for height, width in settings["image_grid_pinpoints"])
    views = AnyresViews(base, grid, canvases, side=base.size[0], port=True)
    return _processor(folder, config, views, num_learned=1)


def _square(folder: Folder, config: Mapping[str, Any]) -> tuple[SquareViews, tuple[int, int]]:
    """Views of one tile, and the grid of its tokens."""
    settings, where = image_settings(folder, DEFAULTS), f"{folder}: image processor"
    vision = config["vision_config"]
    crop = settings["do_center_crop"] and settings["crop_size"] is not None
    size = height_and_width(settings["crop_size" if crop else "size"], where)
    grid = (size[0] // vision.get("patch_size", 32), size[1] // vision.get("patch_size", 32))
    whole = config.get("vision_feature_select_strategy", "default") == "full"
    if whole and config["model_type"] == "llava_next":
        raise PretrainedError(
            f"{where}: tiles are laid out without class tokens; set vision_feature_select_strategy to 'default'"
        )
    fit = "pad" if settings["do_pad"] and config["model_type"] == "llava" else "crop"
    if not crop and "shortest_edge" not in settings["size"]:
        fit = "stretch"
    views = SquareViews(
        pixels(settings),
        size,
        math.prod(grid) + whole,
        fit,
        shortest_edge=height_and_width(settings["size"], where)[0],
        background=mean_colour(settings),
    )
    return views, grid


def _processor(folder: Folder, config: Mapping[str, Any], views: Any, **fields: Any) -> Processor:
    tokenizer = Tokenizer.from_folder(folder)
    token = processor_settings(folder).get("image_token", "<image>")
    prompt = TemplatePrompt(
        ChatTemplate.from_folder(folder, tokenizer.names), tokenizer, marks={"image": token}, tokens={"image": token}
    )
    return Processor(prompt, views, pad_id(tokenizer, config), **fields)

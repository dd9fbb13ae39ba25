"""LLaVA and LLaVA-NeXT in the format of transformers."""

import dataclasses
import math
from typing import Any

from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.processing.settings import (
    Folder,
    canvas_sizes,
    image_settings,
    pad_id,
    processor_settings,
    square_views,
)
from vlm_jax.processors.anyres import AnyresViews
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.learned import Learned
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.views import Views
from vlm_jax.types import Config, Fields

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


def _square(folder: Folder, config: Config) -> tuple[SquareViews, tuple[int, int]]:
    """Views of one tile, and the grid of its tokens."""
    settings, where = image_settings(folder, DEFAULTS), f"{folder}: image processor"
    views = square_views(settings, where, edge=True)
    patch = config["vision_config"].get("patch_size", 32)
    grid = (views.size[0] // patch, views.size[1] // patch)
    whole = config.get("vision_feature_select_strategy", "default") == "full"
    if whole and config["model_type"] == "llava_next":
        raise PretrainedError(
            f"{where}: tiles with class tokens are not supported; set vision_feature_select_strategy to 'default'"
        )
    if settings["do_pad"] and config["model_type"] == "llava" and views.fit == "crop":
        views = dataclasses.replace(views, fit="pad")
    return dataclasses.replace(views, num_tokens=math.prod(grid) + whole), grid


def _processor(folder: Folder, config: Config, views: Views, **fields: Any) -> Processor:
    tokenizer = Tokenizer.from_folder(folder)
    # The tokenizer's name takes precedence over the processor's, as in transformers.
    token = tokenizer.names.get("image_token") or processor_settings(folder).get("image_token") or "<image>"
    qwen = config["model_type"] == "llava_next" and config.get("text_config", {}).get("model_type") == "qwen2"
    prompt = TemplatePrompt(
        ChatTemplate.from_folder(folder, tokenizer.names),
        tokenizer,
        marks={"image": token},
        tokens={"image": token},
        learned=LEARNED_QWEN if qwen else Learned(),
    )
    return Processor(prompt, views, tokenizer, pad_id(tokenizer, config), **fields)

"""DeepSeek-VL as transformers stores it."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.pretrained.processing.settings import (
    Folder,
    height_and_width,
    image_settings,
    mean_colour,
    pad_id,
    pixels,
    processor_settings,
)
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.system import Processor
from vlm_jax.processors.tokenizer import Tokenizer

# transformers, models/deepseek_vl/image_processing_deepseek_vl.py.
DEFAULTS: dict[str, Any] = {"size": {"height": 384, "width": 384}, "min_size": 14, "do_pad": True}


def processor(folder: Folder, config: Mapping[str, Any]) -> Processor:
    """The processor of a folder with one tower."""
    settings = image_settings(folder, DEFAULTS)
    tokenizer = Tokenizer.from_folder(folder)
    views = SquareViews(
        pixels(settings),
        height_and_width(settings["size"], f"{folder}: image processor"),
        processor_settings(folder).get("num_image_tokens", 576),
        "shrink_rounded",
        background=mean_colour(settings),
        min_size=settings["min_size"],
    )
    token = tokenizer.names.get("image_token", "<image_placeholder>")
    prompt = TemplatePrompt(
        ChatTemplate.from_folder(folder, tokenizer.names), tokenizer, marks={"image": token}, tokens={"image": token}
    )
    return Processor(prompt, views, pad_id(tokenizer, config))

"""DeepSeek-VL and DeepSeek-VL2 in the format of their releases; their inference.py ends at the tokenizer's EOS."""

import math

from vlm_jax.pretrained.deepseek_vl2 import PROJECTOR_DEFAULTS, VISION_DEFAULTS
from vlm_jax.pretrained.family import REQUIRED, check_supported, with_defaults
from vlm_jax.pretrained.processing.settings import (
    COMMON,
    Folder,
    canvas_sizes,
    chat_template,
    end_of_text,
    image_settings,
    mean_colour,
    pad_id,
    pixels,
    processor_settings,
)
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.spelled_prompt import DeepSeekVL2Prompt
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.templates import DEEPSEEK
from vlm_jax.processors.tiles import DeepSeekVL2Views
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Config, Fields

# deepseek_vl/models/image_processing_vlm.py and processing_vlm.py.
IMAGE_DEFAULTS: Fields = {"min_size": 14}
PROCESSOR_DEFAULTS: Fields = {
    "image_tag": "<image_placeholder>",
    "num_image_tokens": 576,
    "add_special_token": False,
    "sft_format": "deepseek",
}
# deepseek_vl2/models/processing_deepseek_vl_v2.py.
DEFAULTS2: Fields = {
    "candidate_resolutions": REQUIRED,
    "patch_size": REQUIRED,
    "downsample_ratio": REQUIRED,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "normalize": True,
    "image_token": "<image>",
    "pad_token": "<｜▁pad▁｜>",
    "add_special_token": False,
    "sft_format": "deepseek",
}


def processor(folder: Folder, config: Config) -> Processor:
    """DeepSeek-VL's processor."""
    where = f"{folder}: processor_config.json"
    own = with_defaults(processor_settings(folder), PROCESSOR_DEFAULTS, where)
    check_supported(own, {"add_special_token": (False,), "sft_format": ("deepseek",)}, where)
    tokenizer = Tokenizer.from_folder(folder)
    prompt = TemplatePrompt(
        chat_template(folder, tokenizer, DEEPSEEK, own_first=False),
        tokenizer,
        marks={"image": own["image_tag"]},
        tokens={"image": own["image_tag"]},
        joined="",
    )
    pad, ends = pad_id(tokenizer, config), end_of_text(tokenizer)
    return Processor(prompt, views(folder, config), tokenizer, pad, end_tokens=ends)


def views(folder: Folder, config: Config) -> SquareViews:
    """DeepSeek-VL's views."""
    del config
    own = with_defaults(processor_settings(folder), PROCESSOR_DEFAULTS, f"{folder}: processor_config.json")
    settings = with_defaults(image_settings(folder, IMAGE_DEFAULTS), {"image_size": REQUIRED}, f"{folder}: images")
    return SquareViews(
        pixels(settings),
        (settings["image_size"], settings["image_size"]),
        own["num_image_tokens"],
        "shrink",
        background=tuple(settings.get("background_color") or mean_colour(settings)),
        min_size=settings["min_size"],
    )


def processor2(folder: Folder, config: Config) -> Processor:
    """DeepSeek-VL2's processor."""
    where = f"{folder}: processor_config.json"
    own = with_defaults(processor_settings(folder), DEFAULTS2, where)
    check_supported(own, {"add_special_token": (False,), "sft_format": ("deepseek",)}, where)
    tokenizer = Tokenizer.from_folder(folder)
    prompt, pad = DeepSeekVL2Prompt(tokenizer, own["image_token"]), tokenizer.id_of(own["pad_token"])
    ends = end_of_text(tokenizer)
    return Processor(prompt, views2(folder, config), tokenizer, pad, num_learned=2, end_tokens=ends)


def views2(folder: Folder, config: Config) -> DeepSeekVL2Views:
    """DeepSeek-VL2's views: tiles of a canvas, and the whole.

    Raises:
      PretrainedError: the processor's settings differ from the model's.
    """
    where = f"{folder}: processor_config.json"
    own = with_defaults(processor_settings(folder), DEFAULTS2, where)
    side = own["candidate_resolutions"][0][1] if own["candidate_resolutions"] else 1
    canvases = canvas_sizes(own["candidate_resolutions"], side, f"{where}: candidate_resolutions")
    rows = math.ceil(side // own["patch_size"] / own["downsample_ratio"])
    check_supported({"tile_tag": "2D", **config}, {"tile_tag": ("2D",)}, "deepseek_vl_v2")
    check_consistent(config, own, side)
    return DeepSeekVL2Views(
        pixels({**COMMON, **own, "do_normalize": own["normalize"]}),
        side,
        (rows, rows),
        canvases,
        whole_first=config.get("global_view_pos", "head") == "head",
    )


def check_consistent(config: Config, own: Config, side: int) -> None:
    """Checks that the processor's settings equal the model's.

    Raises:
      PretrainedError: they differ.
    """
    vision = {**VISION_DEFAULTS, **config.get("vision_config", {})}
    projector = {**PROJECTOR_DEFAULTS, "downsample_ratio": 2, **config.get("projector_config", {})}
    model = {"patch_size": vision["patch_size"], "downsample_ratio": projector["downsample_ratio"], "side": side}
    if config.get("vision_config"):
        check_supported(
            {**own, "side": vision["image_size"]}, {key: (x,) for key, x in model.items()}, "processor_config.json"
        )

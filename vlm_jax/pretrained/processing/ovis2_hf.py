"""Ovis 2 in the format of transformers, whose tiles differ from the release's."""

from vlm_jax.pretrained.family import check_supported
from vlm_jax.pretrained.processing.ovis import LEARNED
from vlm_jax.pretrained.processing.settings import (
    Folder,
    height_and_width,
    image_settings,
    pad_id,
    pixels,
    processor_settings,
)
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.tiles import Ovis2Views
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Config, Fields

# transformers, models/ovis2/image_processing_ovis2.py.
DEFAULTS: Fields = {
    "size": {"height": 384, "width": 384},
    "crop_to_patches": False,
    "max_patches": 12,
    "use_covering_area_grid": True,
}


def processor(folder: Folder, config: Config) -> Processor:
    """The processor of a folder."""
    tokenizer = Tokenizer.from_folder(folder)
    prompt = TemplatePrompt(
        ChatTemplate.from_folder(folder, tokenizer.names),
        tokenizer,
        marks={"image": "<image>"},
        tokens={"image": "<IMG_ATOM>"},
        learned=LEARNED,
    )
    learned = tuple(config["visual_indicator_token_ids"])
    return Processor(
        prompt,
        views(folder, config),
        tokenizer,
        pad_id(tokenizer, config),
        num_learned=len(learned),
        learned_ids=learned,
    )


def views(folder: Folder, config: Config) -> Ovis2Views:
    """The views of a folder: tiles that cover an image."""
    del config
    where = f"{folder}: image processor"
    settings = image_settings(folder, DEFAULTS)
    check_supported(settings, {"use_covering_area_grid": (True,)}, where)
    side, _ = height_and_width(settings["size"], where)
    return Ovis2Views(
        pixels(settings),
        side,
        processor_settings(folder).get("image_seq_length", 256),
        settings["max_patches"] if settings["crop_to_patches"] else 1,
        port=True,
    )

"""PaliGemma and PaliGemma 2, of transformers and of big_vision."""

from pathlib import Path

from PIL import Image

from vlm_jax.pretrained.big_vision_paligemma import tokens_of
from vlm_jax.pretrained.processing.settings import (
    HALF_STATISTICS,
    Folder,
    height_and_width,
    image_settings,
    pad_id,
    pixels,
    processor_settings,
)
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.prefix_prompt import PrefixPrompt
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Config, Fields

# transformers, models/siglip/image_processing_pil_siglip.py; image_seq_length is that of google/paligemma-3b-pt-224.
DEFAULTS: Fields = {
    **HALF_STATISTICS,
    "size": {"height": 224, "width": 224},
    "resample": int(Image.Resampling.BICUBIC),
    "image_seq_length": 256,
}


def processor(folder: Folder, config: Config) -> Processor:
    """The processor of a folder: images in front of `<bos>`, a question and a newline, without a chat template."""
    tokenizer = Tokenizer.from_folder(folder)
    prompt = PrefixPrompt(tokenizer, tokenizer.names.get("image_token", "<image>"))
    return Processor(prompt, views(folder, config), tokenizer, pad_id(tokenizer, config), grouped=True)


def views(folder: Folder, config: Config) -> SquareViews:
    """The views of a folder: one square."""
    del config
    settings = image_settings(folder, DEFAULTS)
    size = height_and_width(settings["size"], f"{folder}: image processor")
    return SquareViews(pixels(settings), size, settings["image_seq_length"])


def processor_big_vision(folder: Folder, config: Config) -> Processor:
    """The processor of an `.npz` of big_vision beside a tokenizer.

    big_vision has no token of images: positions of visual tokens have the id of padding.
    """
    tokenizer = Tokenizer.from_folder(folder)
    pad = pad_id(tokenizer, config)
    prompt = PrefixPrompt(tokenizer, tokenizer.names.get("image_token", "<image>"), image_id=pad)
    return Processor(prompt, views_big_vision(folder, config), tokenizer, pad, grouped=True)


def views_big_vision(folder: Folder, config: Config) -> SquareViews:
    """One square as in big_vision's configs, or as files of transformers' image processor in the folder state.

    Source: big_vision, configs/proj/paligemma/transfers/forkme.py: `resize(res, antialias=True)|value_range(-1, 1)`.
    """
    side, count = tokens_of(config)
    stated = (Path(folder) / "preprocessor_config.json").exists() or processor_settings(folder).get("image_processor")
    if not stated:
        half = (0.5, 0.5, 0.5)
        return SquareViews(Pixels(half, half, Image.Resampling.BILINEAR, resizes_as="tensorflow"), (side, side), count)
    settings = image_settings(folder, {**DEFAULTS, "size": {"height": side, "width": side}, "image_seq_length": count})
    size = height_and_width(settings["size"], f"{folder}: image processor")
    return SquareViews(pixels(settings), size, settings["image_seq_length"])

"""PaliGemma and PaliGemma 2."""

from PIL import Image

from vlm_jax.pretrained.processing.settings import (
    HALF_STATISTICS,
    Folder,
    height_and_width,
    image_settings,
    pad_id,
    pixels,
)
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

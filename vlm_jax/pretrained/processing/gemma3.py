"""Gemma 3."""

from PIL import Image

from vlm_jax.pretrained.processing.settings import (
    HALF_STATISTICS,
    Folder,
    height_and_width,
    image_settings,
    pad_id,
    pixels,
    processor_settings,
)
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.crops import CropViews
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt, TiledText
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Config, Fields

# transformers, models/gemma3: image_processing_pil_gemma3.py, and for pan and scan processing_gemma3.py.
DEFAULTS: Fields = {
    **HALF_STATISTICS,
    "size": {"height": 224, "width": 224},
    "resample": int(Image.Resampling.BILINEAR),
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
NUM_TOKENS = 256  # image_seq_length
# Names of special tokens in the tokenizer's files, and the tokens where it has no such name.
NAMES = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
CROPS_START = "Here is the original image {whole} and here are some crops to help you see better "


def processor(folder: Folder, config: Config) -> Processor:
    """The processor of a folder.

    Images are cropped by pan and scan where a call asks for it with `do_pan_and_scan`, as in transformers, or where the
    image settings state it, which the processor of transformers ignores.
    """
    tokenizer = Tokenizer.from_folder(folder)
    start, token, end = (tokenizer.names.get(role, name) for role, name in NAMES.items())
    text = f"\n\n{start}{token}{end}\n\n"
    prompt = TemplatePrompt(
        ChatTemplate.from_folder(folder, tokenizer.names),
        tokenizer,
        marks={"image": start},
        tokens={"image": token},
        texts={"image": text},
        tiled=TiledText(text, "", "", CROPS_START, " "),
    )
    return Processor(prompt, views(folder, config), tokenizer, pad_id(tokenizer, config), grouped=True)


def views(folder: Folder, config: Config) -> CropViews:
    """The views of a folder: one square, with crops beside it where the image settings state `do_pan_and_scan`."""
    del config
    settings = image_settings(folder, DEFAULTS)
    whole = SquareViews(
        pixels(settings),
        height_and_width(settings["size"], f"{folder}: image processor"),
        processor_settings(folder).get("image_seq_length", NUM_TOKENS),
    )
    return CropViews(
        whole,
        settings["pan_and_scan_max_num_crops"],
        settings["pan_and_scan_min_crop_size"],
        settings["pan_and_scan_min_ratio_to_activate"],
        active=bool(settings["do_pan_and_scan"]),
    )

"""DeepSeek-VL in the format of transformers."""

import dataclasses

from PIL import Image

from vlm_jax.pretrained.deepseek_vl_hf import HIGH_STATISTICS, LOW_STATISTICS
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.processing.settings import (
    CLIP_STATISTICS,
    Folder,
    height_and_width,
    image_settings,
    mean_colour,
    pad_id,
    pixels,
    processor_settings,
)
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.square import SquareViews, TwoSizeViews
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.views import Views
from vlm_jax.types import Config, Fields

# transformers, models/deepseek_vl/image_processing_deepseek_vl.py.
DEFAULTS: Fields = {"size": {"height": 384, "width": 384}, "min_size": 14, "do_pad": True}
# transformers, models/deepseek_vl_hybrid/image_processing_deepseek_vl_hybrid.py.
HYBRID_DEFAULTS: Fields = {
    **DEFAULTS,
    "high_res_size": {"height": 1024, "width": 1024},
    "high_res_resample": 3,
    "high_res_image_mean": CLIP_STATISTICS["image_mean"],
    "high_res_image_std": CLIP_STATISTICS["image_std"],
}


def processor(folder: Folder, config: Config) -> Processor:
    """The processor of a folder with one tower."""
    return _processor(folder, config, views(folder, config))


def processor_hybrid(folder: Folder, config: Config) -> Processor:
    """The processor of a folder with two towers."""
    return _processor(folder, config, views_hybrid(folder, config))


def _processor(folder: Folder, config: Config, own: Views) -> Processor:
    tokenizer = Tokenizer.from_folder(folder)
    token = tokenizer.names.get("image_token", "<image_placeholder>")
    prompt = TemplatePrompt(
        ChatTemplate.from_folder(folder, tokenizer.names), tokenizer, marks={"image": token}, tokens={"image": token}
    )
    return Processor(prompt, own, tokenizer, pad_id(tokenizer, config))


def views(folder: Folder, config: Config) -> SquareViews:
    """Views of a folder with one tower."""
    del config
    settings = image_settings(folder, DEFAULTS)
    return SquareViews(
        pixels(settings),
        height_and_width(settings["size"], f"{folder}: image processor"),
        processor_settings(folder).get("num_image_tokens", 576),
        "shrink_rounded",
        background=mean_colour(settings),
        min_size=settings["min_size"],
    )


def views_hybrid(folder: Folder, config: Config) -> TwoSizeViews:
    """Views of a folder with two towers, which normalise their pixels themselves.

    The release's own code downscales the floating-point pixels of the large tower for the small one; transformers
    downscales 8-bit pixels, as here.

    Raises:
      PretrainedError: the normalisation in the files differs from the model's.
    """
    settings = image_settings(folder, HYBRID_DEFAULTS)
    where = f"{folder}: image processor"
    told = [(tuple(settings[f"{key}image_mean"]), tuple(settings[f"{key}image_std"])) for key in ("high_res_", "")]
    if told != [HIGH_STATISTICS, LOW_STATISTICS]:
        raise PretrainedError(f"{where}: expected means and deviations {[HIGH_STATISTICS, LOW_STATISTICS]}, got {told}")
    low = dataclasses.replace(views(folder, config), pixels=Pixels(resample=Image.Resampling(settings["resample"])))
    high = dataclasses.replace(
        low,
        pixels=Pixels(resample=Image.Resampling(settings["high_res_resample"])),
        size=height_and_width(settings["high_res_size"], where),
        background=mean_colour({"image_mean": settings["high_res_image_mean"]}),
    )
    return TwoSizeViews(high, low)

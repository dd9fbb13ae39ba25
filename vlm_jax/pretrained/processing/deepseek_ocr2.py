"""DeepSeek-OCR 2, in the format of its release, whose `infer` is followed, and in that of transformers."""

import dataclasses
import math

from vlm_jax.pretrained.deepseek_ocr2 import RELEASE, VISION_DEFAULTS
from vlm_jax.pretrained.family import PretrainedError, check_supported, with_defaults
from vlm_jax.pretrained.processing import deepseek_ocr
from vlm_jax.pretrained.processing.settings import (
    COMMON,
    HALF_STATISTICS,
    Folder,
    chat_template,
    height_and_width,
    image_settings,
    pad_id,
    pixels,
    processor_settings,
)
from vlm_jax.processors.mosaic import Mosaic, MosaicViews
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Config, Fields

# modeling_deepseekocr2.py, infer and dynamic_preprocess: arguments and literals, which a folder may have in
# processor_config.json.
RELEASE_DEFAULTS: Fields = {**deepseek_ocr.DEFAULTS, "max_crops": 6, "crop_threshold": 768}
TILE = 3 / 4  # side of a tile as a share of SAM's training size; a mode without tiles has the same
STRETCHED = 768  # without tiles, images of at most this side are stretched, and larger ones padded

# transformers, models/deepseek_ocr2, the image processor and the processor.
DEFAULTS: Fields = {
    **HALF_STATISTICS,
    "size": {"height": 1024, "width": 1024},
    "tile_size": 768,
    "background_color": [127, 127, 127],
}
NUM_TILES = (2, 6)  # the processor's own fewest and most, which take precedence over a folder's image processor
PROCESSOR_DEFAULTS: Fields = {"patch_size": 16, "downsample_ratio": 4}
# As the release writes conversations: an image and a newline before a question, and no names of roles.
TEMPLATE = (
    "{% for message in messages %}{% set content %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{{ '<image>' if item['type'] == 'image' else item['text'] }}{{ '' if loop.last else '\\n' }}"
    "{% endfor %}{% endif %}{% endset %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ content | trim }}{{ eos_token }}{% endgeneration %}{% else %}{{ content | trim }}{% endif %}"
    "{% endfor %}"
)


def processor(folder: Folder, config: Config) -> Processor:
    """The processor of a folder of transformers; where it has no chat template, prompts are as in the release."""
    tokenizer = Tokenizer.from_folder(folder)
    token = tokenizer.names.get("image_token", "<image>")
    template = chat_template(folder, tokenizer, TEMPLATE.replace("<image>", token))
    prompt = TemplatePrompt(template, tokenizer, marks={"image": token}, tokens={"image": token})
    return Processor(prompt, views(folder, config), tokenizer, pad_id(tokenizer, config), num_learned=1)


def views(folder: Folder, config: Config) -> MosaicViews:
    """The views of a folder of transformers.

    Raises:
      PretrainedError: a size that is no square.
    """
    del config
    where = f"{folder}: image processor"
    settings = image_settings(folder, DEFAULTS)
    sizes = with_defaults(processor_settings(folder), PROCESSOR_DEFAULTS, f"{folder}: processor_config.json")
    height, width = height_and_width(settings["size"], where)
    if height != width:
        raise PretrainedError(f"{where}: size: expected equal height and width, got {settings['size']}")
    side, of_pixels = settings["tile_size"], pixels(settings)
    background = tuple(settings["background_color"])

    def view(side: int) -> MosaicViews:
        tokens = math.ceil(side / sizes["patch_size"] / sizes["downsample_ratio"])
        return MosaicViews(of_pixels, side, (tokens, tokens), newlines=False, background=background)

    whole, tile = view(height), view(side)
    mosaic = Mosaic(side, tile.tokens, *NUM_TILES, threshold=side, order="port")
    return dataclasses.replace(whole, mosaic=mosaic, modes=(tile,))


def processor_release(folder: Folder, config: Config) -> Processor:
    """The processor of a folder of the release."""
    return deepseek_ocr.unmarked(folder, _release_settings(folder), views_release(folder, config), num_learned=1)


def views_release(folder: Folder, config: Config) -> MosaicViews:
    """The views of a folder of the release: those of its mode with tiles, unless the folder states others."""
    settings = _release_settings(folder)
    of_table = {"image_size": VISION_DEFAULTS["image_size"]}
    full = with_defaults(config.get("vision_config", {}), of_table, f"{RELEASE}.vision_config")["image_size"]
    of_pixels = pixels({**COMMON, **settings, "do_normalize": settings["normalize"]})
    base, side = settings["base_size"] or full, settings["image_size"] or int(TILE * full)
    options = {key: settings[key] for key in ("min_crops", "max_crops", "crop_threshold", "downsample_ratio")}

    def view(base: int, side: int, tiles: bool) -> MosaicViews:
        stretched = side * VISION_DEFAULTS["image_size"] <= STRETCHED * full
        made = deepseek_ocr.mode(of_pixels, base, side, tiles, stretched=stretched, **options)
        return dataclasses.replace(made, newlines=False)

    others = (view(one, one, False) for one in (side, base))
    return dataclasses.replace(view(base, side, settings["crop_mode"]), modes=tuple(others))


def _release_settings(folder: Folder) -> Fields:
    where = f"{folder}: processor_config.json"
    settings = with_defaults(processor_settings(folder), RELEASE_DEFAULTS, where)
    check_supported(settings, deepseek_ocr.SUPPORTED, where)
    return settings

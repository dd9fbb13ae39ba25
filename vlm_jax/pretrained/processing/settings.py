"""Processor settings of a checkpoint folder: `preprocessor_config.json`, `processor_config.json` and others."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import cast

from etils import epath
from PIL import Image

from vlm_jax.pretrained.family import PretrainedError, check_supported, system_section, text_section
from vlm_jax.processors.chat import ChatTemplate, MissingChatTemplate
from vlm_jax.processors.image import FIXED_POINT
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.tokenizer import Tokenizer, TokenizerError
from vlm_jax.released_json import PAIR, list_of, read_released, shown
from vlm_jax.types import Config, Fields

Folder = str | os.PathLike[str]

CLIP_STATISTICS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF_STATISTICS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET_STATISTICS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# Defaults of all image processors of transformers.
COMMON: Fields = {
    **CLIP_STATISTICS,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "resample": 3,
}


def _json(path: epath.Path) -> Fields:
    """The JSON object of a file; empty if it does not exist."""
    return read_released(path, PretrainedError) if path.exists() else {}


def processor_settings(folder: Folder) -> Fields:
    """`processor_config.json`."""
    return _json(epath.Path(folder) / "processor_config.json")


def image_settings(folder: Folder, defaults: Config) -> Fields:
    """Image settings: a file's keys that are not null, over defaults of the class and of all classes.

    New files have them inside `processor_config.json`, older ones in `preprocessor_config.json`.

    Raises:
      PretrainedError: pixels are not resized, or not rescaled by 1/255.
    """
    inside = processor_settings(folder).get("image_processor") or {}
    given = {**_json(epath.Path(folder) / "preprocessor_config.json"), **inside}
    return _usable({**COMMON, **defaults, **_stated(given)}, f"{folder}: image processor")


def video_settings(folder: Folder) -> Fields:
    """Settings only for videos, from `processor_config.json` or `video_preprocessor_config.json`."""
    inside = processor_settings(folder).get("video_processor") or {}
    return _stated({**_json(epath.Path(folder) / "video_preprocessor_config.json"), **inside})


def video_pixels(folder: Folder, images: Config) -> Pixels:
    """Resizing and normalisation of a video's frames, by torch as in the video processors of transformers.

    qwen-vl-utils resizes files first and rounds once, after both axes: mostly within 1 of this.

    Args:
      folder: of the checkpoint.
      images: settings of images, used where there are none for videos.

    Raises:
      PretrainedError: frames are not resized, not rescaled by 1/255, or resized with another filter.
    """
    where = f"{folder}: video processor"
    settings = _usable({**images, **video_settings(folder)}, where)
    check_supported(settings, {"resample": tuple(map(int, FIXED_POINT))}, where)
    return dataclasses.replace(pixels(settings), resizes_as="torch")


def _stated(settings: Config) -> Fields:
    return {key: value for key, value in settings.items() if value is not None}


def _usable(settings: Fields, where: str) -> Fields:
    check_supported(settings, {"do_resize": (True,), "do_rescale": (True,)}, where)
    if abs(settings["rescale_factor"] * 255 - 1) > 1e-6:
        raise PretrainedError(f"{where}: rescale_factor: expected 1/255, got {settings['rescale_factor']}")
    return settings


def tokenizer_settings(folder: Folder) -> Fields:
    """`tokenizer_config.json`."""
    return _json(epath.Path(folder) / "tokenizer_config.json")


def pixels(settings: Config) -> Pixels:
    """Filter and statistics of image settings."""
    resample = Image.Resampling(settings["resample"])
    if not settings["do_normalize"]:
        return Pixels(resample=resample)
    mean, std = (_per_channel(settings[name]) for name in ("image_mean", "image_std"))
    if not all(std):
        raise PretrainedError(f"image_std: expected no zero, got {settings['image_std']}")
    return Pixels(mean, std, resample)


def _per_channel(value: float | int | Sequence[float | int]) -> tuple[float, ...]:
    """Three numbers; one number is that of all channels, as in transformers."""
    values = (value,) if isinstance(value, float | int) else tuple(value)
    return tuple(map(float, values * 3 if len(values) == 1 else values))


def mean_colour(settings: Config) -> tuple[int, ...]:
    """The mean in 8 bits, also where pixels are not normalised."""
    return tuple(int(value * 255) for value in _per_channel(settings["image_mean"]))


def height_and_width(value: object, where: str) -> Size:
    """A size stored as a number, or as height and width; a `shortest_edge` is the side of a square.

    Raises:
      PretrainedError: another format.
    """
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping):
        if value.get("height") and value.get("width"):
            return value["height"], value["width"]
        if value.get("shortest_edge"):
            return value["shortest_edge"], value["shortest_edge"]
    if isinstance(value, list | tuple):
        return value[0], value[1]
    raise PretrainedError(f"{where}: expected a number, or height and width, got {value!r}")


def canvas_sizes(pairs: object, side: int, where: str) -> tuple[Size, ...]:
    """(height, width) of canvases, which tiles of `side` pixels fill.

    Args:
      pairs: (width, height) of every canvas, as releases list them.
      side: of a tile, in pixels.
      where: name of the setting for errors.

    Raises:
      PretrainedError: no list of pairs, or a side that is no multiple of a tile's.
    """
    form = list_of(PAIR)
    if not form.accepts(pairs) or not pairs:
        raise PretrainedError(f"{where}: expected {form.expected}, got {shown(pairs)}")
    found = tuple((height, width) for width, height in cast(Sequence[Sequence[int]], pairs))
    if odd := next((size for size in found if size[0] % side or size[1] % side), None):
        raise PretrainedError(f"{where}: expected multiples of a tile of {side} pixels, got {[odd[1], odd[0]]}")
    return found


def square_views(settings: Config, where: str, *, edge: bool) -> SquareViews:
    """One view per image, a central crop or stretched, with one token.

    Args:
      settings: image settings: `size`, and `crop_size` where `do_center_crop`.
      where: name of the settings for errors.
      edge: whether a `size` of one number is that of the shorter side, as in CLIP, or of a square.

    Raises:
      PretrainedError: images would keep their aspect ratio, or be both stretched and cropped.
    """
    size, crop_size = settings["size"], settings.get("crop_size")
    if isinstance(size, int) and edge:
        size = {"shortest_edge": size}
    crop = height_and_width(crop_size, where) if settings.get("do_center_crop") and crop_size is not None else None
    length = height_and_width(size, where)
    keeps = isinstance(size, Mapping) and "shortest_edge" in size
    if keeps and crop is None:
        raise PretrainedError(f"{where}: size {size} without do_center_crop gives images of any aspect ratio")
    if not keeps and crop not in (None, length):
        raise PretrainedError(f"{where}: expected a size of shortest_edge with crop_size {crop_size}, got {size}")
    fields = {"fit": "crop", "shortest_edge": length[0]} if keeps else {"fit": "stretch"}
    return SquareViews(pixels(settings), crop or length, background=mean_colour(settings), **fields)  # type: ignore


def chat_template(folder: Folder, tokenizer: Tokenizer, source: str | None, *, own_first: bool = True) -> ChatTemplate:
    """The folder's template, or the one in a release's code.

    Args:
      folder: of the checkpoint.
      tokenizer: provides the special tokens.
      source: template of the release's code; None where it has none.
      own_first: whether the folder's template takes precedence over the code's.
    """
    if source is not None and not own_first:
        return ChatTemplate(source, tokenizer.names)
    try:
        return ChatTemplate.from_folder(folder, tokenizer.names)
    except MissingChatTemplate:
        if source is None:
            raise
        return ChatTemplate(source, tokenizer.names)


def write_image_size(folder: Folder, views: SquareViews) -> None:
    """Writes the image size to the image processor files of a folder.

    Args:
      folder: an existing folder, with or without such files.
      views: views of that size.
    """
    tile = dict(zip(("height", "width"), views.size, strict=True))
    size = {"shortest_edge": views.shortest_edge} if views.fit == "crop" else tile
    for name, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = epath.Path(folder) / name
        whole = _json(path)
        settings = whole if section is None else whole.get(section)
        if settings:
            settings |= {"size": size} | ({"crop_size": tile} if settings.get("crop_size") is not None else {})
            path.write_text(json.dumps(whole, indent=2) + "\n")


def end_of_text(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The name of the tokenizer's end-of-text token, for releases whose code ends an answer there."""
    return (tokenizer.names["eos_token"],) if "eos_token" in tokenizer.names else ()


def pad_id(tokenizer: Tokenizer, config: Config) -> int:
    """The tokenizer's padding id, the config's, or 0."""
    stated = (system_section(config).get("pad_token_id"), text_section(config).get("pad_token_id"))
    candidates = (tokenizer.pad_id, *stated, tokenizer.eos_id, 0)
    return next(index for index in candidates if isinstance(index, int) and index >= 0)


def pad_row(index: int, rows: int, origin: str, *, is_masked: bool) -> int:
    """The row of a model's table for padding.

    Args:
      index: id of the padding token.
      rows: number of rows of the table.
      origin: where the id comes from, for errors.
      is_masked: whether padding is masked; any row then serves for an id without one.

    Raises:
      TokenizerError: padding is not masked, and the table has no row for it.
    """
    if index < rows:
        return index
    if not is_masked:
        raise TokenizerError(
            f"{origin}: the padding token has the id {index}, but the model's table has only {rows} rows; name a "
            "pad_token of the table in tokenizer_config.json"
        )
    return 0

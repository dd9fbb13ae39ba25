"""Prismatic and OpenVLA in the format of their releases."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from vlm_jax.pretrained.family import PretrainedError, check_supported, with_defaults
from vlm_jax.pretrained.prismatic import DEFAULTS, sizes_of, towers
from vlm_jax.pretrained.processing.settings import Folder, chat_template, end_of_text, image_settings, pad_id
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.square import Fit, SquareViews, TwoSizeViews
from vlm_jax.processors.templates import BEFORE_ACTION, PRISMATIC
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Config, Fields

# processing_prismatic.py: `image_resize_strategy` -> fit.
FITS: dict[str, Fit] = {"letterbox": "pad_evenly", "resize-crop": "crop_rounded", "resize-naive": "stretch"}
IMAGE_DEFAULTS: Fields = {
    "image_resize_strategy": "letterbox",
    "means": [[0.5, 0.5, 0.5]],
    "stds": [[0.5, 0.5, 0.5]],
}
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def processor(folder: Folder, config: Config) -> Processor:
    """The processor of a folder: images follow the start token, and the language model's format of turns.

    Prompts of OpenVLA end with a space.

    Raises:
      PretrainedError: a language model whose turns are not known, or what `views` raises.
    """
    where = config["model_type"]
    name = with_defaults(config, DEFAULTS, where)["llm_backbone_id"]
    family = next((key for key in PRISMATIC if name.startswith(key[0]) and name.endswith(key[1])), None)
    if family is None:
        expected = ", ".join("…".join(key) for key in PRISMATIC)
        raise PretrainedError(
            f"{where}.llm_backbone_id: expected one of {expected}, whose turns are known, got {name!r}"
        )
    turns = PRISMATIC[family] + (BEFORE_ACTION if where == "openvla" else "")
    tokenizer = Tokenizer.from_folder(folder)
    # The tag is not a token of the release: the text before and after it is encoded separately.
    holder = tokenizer.names.get("unk_token", tokenizer.names.get("pad_token", "<unk>"))
    prompt = TemplatePrompt(
        chat_template(folder, tokenizer, turns),
        tokenizer,
        marks={"image": "<image>"},
        tokens={"image": holder},
        split=True,
        joined="",
    )
    ends = end_of_text(tokenizer)
    return Processor(prompt, views(folder, config), tokenizer, pad_id(tokenizer, config), end_tokens=ends)


def views(folder: Folder, config: Config) -> SquareViews | TwoSizeViews:
    """The views of a folder: one square, of two towers with the statistics of each.

    The release normalises by `tvf_normalize_params` of the file, which it wrote in bfloat16, not by `means` and `stds`.

    Raises:
      PretrainedError: settings that are unsupported, or that are not for the model's towers.
    """
    where, found = f"{folder}: image processor", towers(config, config["model_type"])
    stated = {key: config[key] for key in ("image_resize_strategy",) if config.get(key) is not None}
    settings = image_settings(folder, {**IMAGE_DEFAULTS, **stated})
    check_supported(settings, {"image_resize_strategy": tuple(FITS)}, where)
    strategy, side = settings["image_resize_strategy"], found[0].side
    letterbox = settings.get("tvf_do_letterbox", strategy == "letterbox")
    if letterbox != (strategy == "letterbox"):
        raise PretrainedError(
            f"{where}: tvf_do_letterbox: expected {strategy == 'letterbox'} with image_resize_strategy {strategy!r}, "
            f"got {letterbox!r}"
        )
    pixels = _pixels(settings, len(found), where)
    for size in settings.get("input_sizes", ()):
        if list(size) != [3, side, side]:
            raise PretrainedError(f"{where}: input_sizes: expected {[3, side, side]}, as in the model, got {size!r}")
    fill = settings.get("tvf_letterbox_fill") or [int(value * 255) for value in settings["means"][-1]]
    patch = sizes_of(found[0].name, config, config["model_type"])["patch_size"]
    own = SquareViews(
        pixels[0], (side, side), (side // patch) ** 2, FITS[strategy], shortest_edge=side, background=tuple(fill)
    )
    if len(found) == 1:
        return own
    return TwoSizeViews(own, SquareViews(pixels[1], own.size, own.num_tokens))


def _pixels(settings: Config, count: int, where: str) -> tuple[Pixels, ...]:
    """Filter and statistics for each of `count` towers."""
    filters = settings.get("interpolations") or ["bicubic"] * count
    check_supported({"interpolations": filters[0]}, {"interpolations": tuple(FILTERS)}, where)
    if len(set(filters)) > 1:
        raise PretrainedError(f"{where}: interpolations: expected one filter for both towers, got {filters!r}")
    kept: list[Mapping[str, Any]] = [
        {"mean": mean, "std": std} for mean, std in zip(settings["means"], settings["stds"], strict=False)
    ]
    key = "means" if settings.get("tvf_normalize_params") is None else "tvf_normalize_params"
    given = settings.get("tvf_normalize_params") or kept
    if len(given) != count:
        raise PretrainedError(f"{where}: {key}: expected those of {count} towers, got {len(given)}")
    statistics = [(tuple(map(float, one["mean"])), tuple(map(float, one["std"]))) for one in given]
    if not all(all(std) for _, std in statistics):
        raise PretrainedError(f"{where}: {key}: expected no deviation of zero, got {[std for _, std in statistics]}")
    return tuple(Pixels(mean, std, FILTERS[filters[0]]) for mean, std in statistics)

"""LLaVA and MobileVLM in the format of their releases."""

import ast
import dataclasses
import re
from collections.abc import Sequence

from vlm_jax.pretrained.family import PretrainedError, check_supported
from vlm_jax.pretrained.llava import DEFAULTS, TOWERS
from vlm_jax.pretrained.processing.settings import (
    CLIP_STATISTICS,
    Folder,
    canvas_sizes,
    chat_template,
    end_of_text,
    pad_id,
    tokenizer_settings,
)
from vlm_jax.pretrained.projector import mm_projector
from vlm_jax.processors import as_released
from vlm_jax.processors.anyres import AnyresViews
from vlm_jax.processors.learned import Learned
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.templates import LLAMA2, MPT, PLAIN, VICUNA
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.released_json import MAX_SIDE, shown
from vlm_jax.types import Config

# LLaVA, train/train.py, preprocess_multimodal, preprocess_v1, preprocess_llama_2, preprocess_mpt and preprocess_plain.
LEARNED = Learned(images_first="always")
# `--version` of the release's training, which no file of a folder holds: `conversation_version` in config.json.
VERSIONS = {
    "v1": (VICUNA, LEARNED),
    "llava_llama_2": (LLAMA2, dataclasses.replace(LEARNED, end=" </s>")),
    "mpt": (MPT, LEARNED),
    "plain": (PLAIN, Learned(end="\n", questions=False)),
}
FIT = {"pad": "pad", "anyres": "crop", "square": "crop", None: "crop"}


def processor(folder: Folder, config: Config) -> Processor:
    """The processor of a folder; by default with the template of Vicuna, with which LLaVA-1.5 was trained."""
    tokenizer = Tokenizer.from_folder(folder)
    # The tag is not a token of the release: the text before and after it is encoded separately.
    holder = tokenizer.names.get("unk_token", tokenizer.names.get("pad_token", "<unk>"))
    longest = config.get("tokenizer_model_max_length", config.get("max_sequence_length"))
    version = config.get("conversation_version")
    if version not in (None, *VERSIONS):
        raise PretrainedError(
            f"{config['model_type']}.conversation_version: expected one of {', '.join(VERSIONS)}, got {version!r}"
        )
    template, learned = VERSIONS[version or "v1"]
    prompt = TemplatePrompt(
        chat_template(folder, tokenizer, template, own_first=version is None),
        tokenizer,
        marks={"image": "<image>"},
        tokens={"image": holder},
        split=True,
        joined="\n",
        learned=learned,
        released=_released(version or "v1", tokenizer_settings(folder), config, longest),
    )
    newline = "unpad" in config.get("mm_patch_merge_type", "flat")
    return Processor(
        prompt,
        views(folder, config),
        tokenizer,
        pad_id(tokenizer, config),
        num_learned=int(newline),
        max_length=longest,
        # LLaVA's eval/run_llava.py and MobileVLM's inference.py stop at this token, sep2 of Vicuna.
        end_tokens=end_of_text(tokenizer),
    )


def _released(version: str, settings: Config, config: Config, longest: int | None) -> as_released.Released:
    """The release's labels with their faults."""
    legacy = settings.get("legacy")
    if version == "v1":
        later = int(legacy is False and config["model_type"] != "mobilevlm")
        return as_released.Vicuna(longest, later)
    if version == "mpt":
        return as_released.ChatML(limit=longest, ended=0, later=-int(bool(legacy)), llava=True)
    return as_released.Llama2(longest) if version == "llava_llama_2" else as_released.Plain()


def views(folder: Folder, config: Config) -> SquareViews | AnyresViews:
    """Views of a config, by `image_aspect_ratio` and `mm_patch_merge_type`; no other file of the folder is read.

    Raises:
      PretrainedError: values other than those of LLaVA-1.5, LLaVA-1.6 and MobileVLM.
    """
    del folder
    settings = {**DEFAULTS, "image_aspect_ratio": None, "mm_patch_merge_type": "flat", **config}
    where, name = config["model_type"], settings["mm_vision_tower"]
    known = {"image_aspect_ratio": tuple(FIT), "mm_patch_merge_type": ("flat", "spatial", "spatial_unpad")}
    check_supported(settings, known, where)
    tower = settings.get("vision_tower_config", TOWERS.get(name))
    if tower is None:
        raise PretrainedError(f"{where}.mm_vision_tower: unknown '{name}'")
    side = tower["image_size"]
    rows = side // tower["patch_size"]
    if settings["s2"]:
        sizes = sorted(map(int, settings["s2_scales"].split(",")))
        side, rows = sizes[-1], sizes[0] // tower["patch_size"]
    connector, _ = mm_projector(settings["mm_projector_type"], settings["hidden_size"], where)
    whole = settings["mm_vision_select_feature"] == "cls_patch"
    count = connector.num_tokens((1, rows * rows + 1) if whole else (rows, rows))  # type: ignore[operator]
    pixels = Pixels(tuple(CLIP_STATISTICS["image_mean"]), tuple(CLIP_STATISTICS["image_std"]))
    square = SquareViews(pixels, (side, side), count, FIT[settings["image_aspect_ratio"]])  # type: ignore[arg-type]
    merge = settings["mm_patch_merge_type"]
    if settings["image_aspect_ratio"] == "anyres":
        return AnyresViews(square, (rows, rows), canvases(settings["image_grid_pinpoints"], side, where), side, merge)
    return square if merge == "flat" else AnyresViews(square, (rows, rows), (), side, merge)


def canvases(pinpoints: str | Sequence[Sequence[int]], side: int, where: str) -> tuple[Size, ...]:
    """(height, width) of the canvases: `[[336, 672], …]` as (width, height), as text, or as a range `(1x1),...,(2x2)`.

    Raises:
      PretrainedError: another format, or sizes that tiles of `side` pixels do not fill.
    """
    where = f"{where}.image_grid_pinpoints"
    if isinstance(pinpoints, str):
        if found := re.findall(r"\((\d+)x(\d+)\)", pinpoints):
            pinpoints = _range(found, side, where)
        else:
            try:
                pinpoints = ast.literal_eval(pinpoints)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
                raise PretrainedError(f"{where}: expected pairs of pixels, got {shown(pinpoints)}") from error
    return canvas_sizes(pinpoints, side, where)


def _range(corners: Sequence[tuple[str, str]], side: int, where: str) -> list[list[int]]:
    """(width, height) of all grids of tiles from the first to the last."""
    (across, down), (most_across, most_down) = corners[0], corners[-1]
    most = MAX_SIDE // side
    if any(len(number) > 4 or not 1 <= int(number) <= most for number in (*corners[0], *corners[-1])):
        raise PretrainedError(
            f"{where}: expected grids of 1 to {most} tiles of {side} pixels a side, got "
            f"{shown(f'({across}x{down}),...,({most_across}x{most_down})')}"
        )
    rows = range(int(down), int(most_down) + 1)
    return [[i * side, j * side] for i in range(int(across), int(most_across) + 1) for j in rows]

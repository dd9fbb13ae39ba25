"""DeepSeek-OCR's processor: the views of every mode, ids, counts of tokens, and n-grams that may not be repeated."""

import dataclasses
import json
import pathlib
import re

import numpy as np
from PIL import Image

from tests.golden import comparison
from vlm_jax.generation.repeats import repeats_of
from vlm_jax.pretrained.processing.deepseek_ocr import mode, processor
from vlm_jax.processors.mosaic import MosaicViews
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.spelled_prompt import UnmarkedPrompt

NOT_COMPARED = {
    r"counts\..*\.valid_tokens": "a figure that the release prints beside its answer; no id or pixel follows from it"
}
VLLM = "_vllm"  # what the names of modes of the other official processor end with
PROMPT = "prompt.0"  # of the arrays of images


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array of the folder."""
    golden = comparison.read(folder)
    base = processor(folder, {})
    modes = read_modes(folder, base)
    found: dict[str, np.ndarray] = {}
    for name in golden.expected:
        if case := re.fullmatch(r"(\w+)\.(image\.\d+)\.num_tokens", name):
            of_mode, image = case.groups()
            found |= seen(golden, with_views(base, modes[of_mode], of_mode), f"{of_mode}.{image}", inputs[image])
        elif case := re.fullmatch(r"(prompt\.\d+)\.(hf|vllm)_input_ids", name):
            of_mode = "tiny" if case.group(2) == "hf" else f"tiny{VLLM}"
            picture = next(inputs[key] for key in inputs if key.startswith("image."))
            found[name] = ids(with_views(base, modes["tiny"], of_mode), str(inputs[case.group(1)]), picture)[0]
        elif case := re.fullmatch(r"counts\.(\w+)\.tokens", name):
            found |= counts(modes, case.group(1), inputs["counts.sizes"])
        elif case := re.fullmatch(r"(ngram\.\d+)\.banned", name):
            found[name] = banned(inputs, case.group(1), len(golden.expected[name]))
    return {name: np.asarray(array) for name, array in found.items() if name in golden.expected}


def read_modes(folder: pathlib.Path, base: Processor) -> dict[str, MosaicViews]:
    """The views of every mode that the folder lists."""
    listed = json.loads((folder / "modes.json").read_text())
    return {
        name: mode(
            base.views.pixels,
            settings["base_size"],
            settings["image_size"],
            settings["crop_mode"],
            max_crops=settings["max_crops"],
        )
        for name, settings in listed.items()
    }


def with_views(base: Processor, views: MosaicViews, name: str) -> Processor:
    """The processor of a mode; the other official one takes a text as it is."""
    assert isinstance(base.prompt, UnmarkedPrompt)
    prompt = dataclasses.replace(base.prompt, strips=not name.endswith(VLLM))
    return dataclasses.replace(base, views=views, prompt=prompt)


def ids(processor: Processor, text: str, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a question about a picture, and where the picture is."""
    batch = processor([{"role": "user", "content": text}], [picture])
    return batch.tokens[0].astype(np.int64), batch.visual_index[0] >= 0


def seen(golden: comparison.Golden, processor: Processor, name: str, picture: np.ndarray) -> dict[str, np.ndarray]:
    """What a mode makes of an image: ids, views and their moments."""
    views, size = processor.views, picture.shape[:2]
    (image,) = views.images([Image.fromarray(picture)])
    tokens, visual = ids(processor, str(golden.inputs[PROMPT]), picture)
    found = {
        f"{name}.crop_grid": np.array((views.grid(size) or (1, 1))[::-1]),
        f"{name}.num_tokens": np.array(len(image.layout)),
        f"{name}.input_ids": tokens,
        f"{name}.images_seq_mask": visual,
        f"{name}.pixel_moments": moments(image.pixels),
        f"{name}.pixels": thinned(golden, f"{name}.pixels", image.pixels),
    }
    if image.parts is not None:
        found[f"{name}.crop_moments"] = moments(image.parts)
        found[f"{name}.crops"] = thinned(golden, f"{name}.crops", image.parts)
    return found


def moments(pixels: np.ndarray) -> np.ndarray:
    """Mean and mean square of each view and channel [n, 2, 3]."""
    exact = pixels.astype(np.float64)
    return np.stack([exact.mean((1, 2)), (exact**2).mean((1, 2))], axis=1).astype(np.float32)


def thinned(golden: comparison.Golden, name: str, pixels: np.ndarray) -> np.ndarray:
    """The rows and columns that the manifest says an array holds [n, 3, H, W]."""
    every = pixels.transpose(0, 3, 1, 2)
    meaning = golden.entries[name]["meaning"] if name in golden.entries else ""
    if told := re.search(r"every (\d+)(?:st|nd|rd|th) row from (\d+) and column from (\d+)", meaning):
        step, row, column = map(int, told.groups())
        return every[:, :, row::step, column::step]
    return every


def counts(modes: dict[str, MosaicViews], name: str, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Tokens and tiles of images of so many sizes; a name can end with the most crops of a mode."""
    of_mode, _, most = name.partition("_max")
    views = modes[of_mode]
    if most:
        assert views.mosaic is not None
        views = dataclasses.replace(views, mosaic=dataclasses.replace(views.mosaic, max_tiles=int(most)))
    ours = [(int(height), int(width)) for width, height in sizes]
    return {
        f"counts.{name}.tokens": np.array([len(layout) for layout in views.layouts(ours)]),
        f"counts.{name}.grid": np.array([(views.grid(size) or (1, 1))[::-1] for size in ours]),
    }


def banned(inputs: dict[str, np.ndarray], name: str, size: int) -> np.ndarray:
    """Which of `size` ids would repeat an n-gram."""
    ids, (ngram, window) = inputs[f"{name}.ids"][None], inputs[f"{name}.settings"].astype(np.int32)
    repeats = repeats_of(ids, np.ones(ids.shape, bool), 1)
    allowed = inputs[f"{name}.whitelist"].astype(np.int32)
    return np.array(repeats.excluded(ngram, window, size, allowed)[0])

"""The prompts of the LLaVA and MobileVLM folders: logits, losses and greedy ids."""

import json
import re
from typing import Any

import numpy as np

from tests.golden import comparison
from tests.golden.comparison import Golden
from tests.golden.systems import anyres, language
from tests.golden.systems.language import Row
from tests.golden.systems.pixels import CLIP, normalised

PLACEHOLDER = -200  # IMAGE_TOKEN_INDEX of the release


def pictures(golden: Golden) -> list[np.ndarray]:
    """The pixels of every image of the folder, each [tiles, height, width, channels]."""
    expected = golden.expected
    if "pixel_values" in expected:
        return [image[None] for image in expected["pixel_values"].transpose(0, 2, 3, 1)]
    if "images_u8" in golden.inputs:
        return [np.asarray(normalised(image[None], CLIP)) for image in golden.inputs["images_u8"]]
    tiles = (expected[f"img{i}_pixel_values"] for i in range(len(sizes(golden))))
    return [np.asarray(normalised(image.transpose(0, 2, 3, 1), CLIP)) for image in tiles]


def sizes(golden: Golden) -> list[tuple[int, ...]]:
    """Shapes of the images before they are cut into tiles."""
    names = sorted(name for name in golden.inputs if re.fullmatch(r"img\d+_u8", name))
    return [golden.inputs[name].shape for name in names]


class Prompts:
    """Rows of the folder's prompts, for a model that was loaded from it."""

    def __init__(self, golden: Golden, ours: Any):
        self.golden, self.ours = golden, ours
        self.images = pictures(golden)
        self.config = json.loads((golden.folder / "config.json").read_text())
        grid = ours.module.encoder.grid(*self.images[0].shape[1:3])
        self.count = ours.module.connector.num_tokens(grid)

    def runs(self, images: list[int]) -> list[np.ndarray]:
        """The rows of the visual table of each of the images, which are one after another in it."""
        if self.ours.module.learned_rows is None:
            return [self.count * i + np.arange(self.count) for i in range(len(images))]
        runs, start = [], 0
        for image in images:
            run = anyres.run(sizes(self.golden)[image], self.config, int(self.count**0.5))
            runs.append(np.where(run == anyres.NEWLINE, run, run + start))
            start += self.count * len(self.images[image])
        return runs

    def row(self, ids: np.ndarray, images: list[int], *, joined: bool = False) -> Row:
        """A prompt with a placeholder for each image, or one for all."""
        if not images:
            return language.text(ids)
        runs = self.runs(images)
        pixels = np.concatenate([self.images[image] for image in images])
        return language.spliced(ids, [np.concatenate(runs)] if joined else runs, pixels, placeholder=PLACEHOLDER)

    def rows(self) -> dict[str, Row]:
        """Every row of every prompt of the folder, without its padding."""
        inputs, entries, found = self.golden.inputs, self.golden.entries, {}
        for case in cases(self.golden):
            ids = [row[mask] for row, mask in zip(inputs[f"{case}_ids"], masks(self.golden, case), strict=True)]
            images = comparison.pictures(entries[f"{case}_ids"], [int((row == PLACEHOLDER).sum()) for row in ids])
            found |= {f"{case}.{i}": self.row(row, of) for i, (row, of) in enumerate(zip(ids, images, strict=True))}
        if "multi_logits" in self.golden.expected:
            meaning = entries["multi_logits"]["meaning"]
            found["multi.0"] = self.row(
                inputs[f"{named_case(meaning)}_ids"][0], comparison.named_pictures(meaning), joined=True
            )
        return found


def cases(golden: Golden) -> list[str]:
    """The names of the folder's prompts."""
    return [name.removesuffix("_ids") for name in golden.inputs if name.endswith("_ids")]


def masks(golden: Golden, case: str) -> np.ndarray:
    """Which ids of a prompt are real, [B, T]."""
    ids = golden.inputs[f"{case}_ids"]
    return golden.inputs.get(f"{case}_mask", np.ones_like(ids)) > 0


def named_case(meaning: str) -> str:
    """The prompt that an array is of, as the manifest says: `one_ids with a list of images 0 and 1`."""
    if (found := re.search(r"(\w+)_ids", meaning)) is None:
        raise ValueError(f"the manifest names no prompt: {meaning}")
    return found.group(1)


def outputs(golden: Golden, ours: Any) -> dict[str, np.ndarray]:
    """Every array after the projector that the folder's manifest names."""
    prompts = Prompts(golden, ours)
    rows = prompts.rows()
    layouts = _layouts(golden, prompts) if ours.module.learned_rows is not None else {}
    if layouts:
        states = language.states(ours, {**rows, **layouts})
        logits = {name: states[name].logits for name in rows}
        found = {name: states[name].embeddings for name in layouts}
        if "truncated_embeds" in golden.expected:
            of = f"{named_case(golden.entries['truncated_embeds']['meaning'])}.0"
            length = golden.expected["truncated_embeds"].shape[1]
            found["truncated_embeds"] = states[of].embeddings[None, :length]
    else:
        logits, found = language.logits(ours, rows), {}
    for case in dict.fromkeys(name.rpartition(".")[0] for name in rows):
        found |= _of_case(golden, prompts, case, rows, logits)
    return found | language.greedy_cases(golden, ours, rows, "_greedy")


def _of_case(
    golden: Golden, prompts: Prompts, case: str, rows: dict[str, Row], logits: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Logits and the loss of a prompt's rows: padded on the right, and on the left where the folder has it so too."""
    sides = {case: logits, f"{case}_right": logits}
    if any(name.startswith(f"{case}_left_") for name in golden.expected):
        these = {name: row for name, row in rows.items() if name.rpartition(".")[0] == case}
        sides[f"{case}_left"] = language.logits(prompts.ours, these, left=True)
    found: dict[str, Any] = {}
    for side, given in sides.items():
        if f"{side}_loss" in golden.expected:
            found[f"{side}_loss"] = language.loss(language.of_case(given, case), _labels(golden, case, rows))
        for ending in ("logits", "last_logits"):
            if (name := f"{side}_{ending}") in golden.expected:
                found[name] = language.shown_rows(golden, name, language.of_case(given, case))
    return found


def _labels(golden: Golden, case: str, rows: dict[str, Row]) -> list[np.ndarray]:
    """The labels of a prompt's rows, with visual tokens ignored."""
    given = zip(
        language.of_case(rows, case),
        golden.inputs[f"{case}_labels"],
        golden.inputs[f"{case}_ids"],
        masks(golden, case),
        strict=True,
    )
    return [language.spliced_labels(row, labels[mask & (ids != PLACEHOLDER)]) for row, labels, ids, mask in given]


def _layouts(golden: Golden, prompts: Prompts) -> dict[str, Row]:
    """Tiles put together in each of the ways that LLaVA knows, as rows without text."""
    side, layouts = int(prompts.count**0.5), {}
    for name in golden.expected:
        if match := re.fullmatch(r"img(\d+)_(merged|spatial|flat)", name):
            i, kind = int(match.group(1)), match.group(2).replace("merged", "spatial_unpad")
            run = anyres.run(sizes(golden)[i], prompts.config, side, kind)
            layouts[name] = Row(np.zeros(len(run), int), run, prompts.images[i])
    if "single_merged" in golden.expected:  # of the first tile of an image
        (image,) = comparison.pictures(golden.entries["single_merged"], [1])[0]
        run = np.append(1 + np.arange(prompts.count), anyres.NEWLINE)
        layouts["single_merged"] = Row(np.zeros(len(run), int), run, prompts.images[image][:1])
    return layouts

"""The prompts of the LLaVA and MobileVLM folders: logits, losses and greedy ids."""

import json
import re
from typing import Any

import numpy as np

from tests.golden.comparison import Golden
from tests.golden.systems import anyres, language
from tests.golden.systems.language import Row
from tests.golden.systems.pixels import CLIP, normalised

PLACEHOLDER = -200  # IMAGE_TOKEN_INDEX of the release


def pictures(golden: Golden) -> list[np.ndarray]:
    """The pixels of every image of the folder, each [tiles, height, width, channels]."""
    expected = golden.expected
    if "pixel_values" in expected:
        return [expected["pixel_values"].transpose(0, 2, 3, 1)]
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
        """Every prompt of the folder; those of the batch without their padding."""
        inputs, several = self.golden.inputs, bool(sizes(self.golden))
        found = {"one": self.row(inputs["one_ids"][0], [1 if several else 0])}
        if "text_ids" in inputs:
            found["text"] = self.row(inputs["text_ids"][0], [])
        if "two_ids" in inputs:
            found["two"] = self.row(inputs["two_ids"][0], [0, 2] if several else [0, 1])
        if "multi_logits" in self.golden.expected:
            found["multi"] = self.row(inputs["one_ids"][0], [0, 1], joined=True)
        if "batch_ids" in inputs:
            images = [[3], []] if several else [[1], [2]]
            for i, (ids, mask) in enumerate(zip(inputs["batch_ids"], inputs["batch_mask"] > 0, strict=True)):
                found[f"batch.{i}"] = self.row(ids[mask], images[i])
        return found


def outputs(golden: Golden, ours: Any) -> dict[str, np.ndarray]:
    """Every array after the projector that the folder's manifest names."""
    prompts = Prompts(golden, ours)
    rows = prompts.rows()
    layouts = _layouts(golden, prompts) if ours.module.learned_rows is not None else {}
    if layouts:
        states = language.states(ours, {**rows, **layouts})
        logits = {name: states[name].logits for name in rows}
        length = golden.expected["truncated_embeds"].shape[1]
        found = {name: states[name].embeddings for name in layouts}
        found["truncated_embeds"] = states["one"].embeddings[None, :length]
    else:
        logits, found = language.logits(ours, rows), {}
    found |= {
        f"{name}_logits": language.shown(golden.entries[f"{name}_logits"], logits[name])[None]
        for name in rows
        if not name.startswith("batch.")
    }
    if "batch.0" in rows:
        found |= _of_batch(golden, prompts, rows, logits)
    names = [name.removesuffix("_greedy") for name in golden.expected if name.endswith("_greedy")]
    count = len(golden.expected[f"{names[0]}_greedy"])
    ids = language.greedy(ours, {name: rows[name] for name in names}, count)
    found |= {f"{name}_greedy": ids[name] for name in names}
    return found


def _of_batch(golden: Golden, prompts: Prompts, rows: dict[str, Row], logits: dict) -> dict[str, Any]:
    """The batch as one: padded on the right, and on the left where the folder has it so too."""
    names = sorted(name for name in rows if name.startswith("batch."))
    labels = [
        language.spliced_labels(rows[name], given[mask & (ids != PLACEHOLDER)])
        for name, given, ids, mask in zip(
            names,
            golden.inputs["batch_labels"],
            golden.inputs["batch_ids"],
            golden.inputs["batch_mask"] > 0,
            strict=True,
        )
    ]
    sides = {"batch": logits, "batch_right": logits}
    if "batch_left_loss" in golden.expected:
        sides["batch_left"] = language.logits(prompts.ours, {name: rows[name] for name in names}, left=True)
    found: dict[str, Any] = {}
    for side, given in sides.items():
        these = [given[name] for name in names]
        if f"{side}_loss" in golden.expected:
            found[f"{side}_loss"] = language.loss(these, labels)
        for ending in ("logits", "last_logits"):
            if (name := f"{side}_{ending}") in golden.expected:
                shown = np.stack([language.shown(golden.entries[name], array) for array in these])
                found[name] = shown.reshape(golden.expected[name].shape)
    return found


def _layouts(golden: Golden, prompts: Prompts) -> dict[str, Row]:
    """Tiles combined in each of the ways that LLaVA knows, as rows without text."""
    side, cases = int(prompts.count**0.5), {}
    for name in golden.expected:
        if match := re.fullmatch(r"img(\d+)_(merged|spatial|flat)", name):
            i, kind = int(match.group(1)), match.group(2).replace("merged", "spatial_unpad")
            run = anyres.run(sizes(golden)[i], prompts.config, side, kind)
            cases[name] = Row(np.zeros(len(run), int), run, prompts.images[i])
    run = np.append(1 + np.arange(prompts.count), anyres.NEWLINE)
    cases["single_merged"] = Row(np.zeros(len(run), int), run, prompts.images[0][:1])
    return cases

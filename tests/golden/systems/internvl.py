"""InternVL: InternViT, its projector, and the language model; a selected layer may leave out the last ones."""

import json
import pathlib
import re

import jax
import numpy as np

import vlm_jax
from tests.golden import comparison
from tests.golden.systems import language
from tests.golden.systems.language import Row
from tests.golden.systems.pixels import IMAGENET, normalised


def prompts(golden: comparison.Golden, count: int) -> dict[str, Row]:
    """The rows of every prompt of the folder, which take its tiles in order, but for those that flags leave out.

    Args:
      golden: the folder.
      count: tokens of a tile.
    """
    tiles = np.asarray(normalised(golden.inputs["tiles_u8"], IMAGENET))
    context = int(re.search(r"Context token id (\d+)", (golden.folder / "cases.md").read_text()).group(1))
    rows = {}
    for case in cases(golden):
        flags = re.search(r"image_flags \[([01, ]+)\]", golden.entries[f"{case}_ids"]["meaning"])
        kept = [flag.strip() == "1" for flag in flags.group(1).split(",")] if flags else [True] * len(tiles)
        numbers = iter(np.flatnonzero(kept))
        for i, ids in enumerate(golden.inputs[f"{case}_ids"]):
            where = ids == context
            images = [next(numbers) for _ in range(where.sum() // count)]
            rows[f"{case}.{i}"] = language.at(ids, where, np.arange(where.sum()), tiles[images] if images else None)
    return rows


def cases(golden: comparison.Golden) -> list[str]:
    """The names of the folder's prompts."""
    return [name.removesuffix("_ids") for name in golden.inputs if name.endswith("_ids")]


def spoken(golden: comparison.Golden, ours: vlm_jax.pretrained.Pretrained) -> dict[str, np.ndarray]:
    """Logits, losses and greedy ids."""
    grid = ours.module.encoder.grid(*golden.inputs["tiles_u8"].shape[1:3])
    rows, found = prompts(golden, ours.module.connector.num_tokens(grid)), {}
    logits = language.logits(ours, rows)
    for case in cases(golden):
        these = language.of_case(logits, case)
        if (name := f"{case}_logits") in golden.expected:
            found[name] = language.shown_rows(golden, name, these)
        if f"{case}_loss" in golden.expected:
            found[f"{case}_loss"] = language.loss(these, golden.inputs[f"{case}_labels"])
    return found | language.greedy_cases(golden, ours, rows, "_greedy")


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array of the folder."""
    golden = comparison.read(folder)
    config = json.loads((folder / "config.json").read_text())
    whole = vlm_jax.from_pretrained(folder, config={**config, "select_layer": -1})
    tile = normalised(inputs["tiles_u8"][:1], IMAGENET)
    encoder = whole.module.encoder
    run = jax.jit(lambda params, x: encoder.apply({"params": params}, x, collect=True).hidden)
    hidden = run(whole.params["encoder"], tile)
    found = {"vit_embeddings": hidden[0], "vit_layer1": hidden[1], "vit_last": hidden[-1]}
    selected = vlm_jax.from_pretrained(folder)
    tokens = jax.jit(lambda x: selected.apply(x, method="visual_tokens").tokens)
    for name, images in {"features": "tiles_u8", "big_features": "big_u8"}.items():
        if images in inputs:
            found[name] = tokens(normalised(inputs[images], IMAGENET))
    found |= spoken(golden, selected)
    return {name: np.asarray(value) for name, value in found.items() if name in golden.expected}

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


def prompts(golden: comparison.Golden) -> dict[str, Row]:
    """The prompts of the folder, whose tiles follow one another in order, but for those that flags leave out."""
    tiles = np.asarray(normalised(golden.inputs["tiles_u8"], IMAGENET))
    context = int(re.search(r"Context token id (\d+)", (golden.folder / "cases.md").read_text()).group(1))
    texts = [name.removesuffix("_ids") for name in golden.inputs if name in ("text_ids", "long_ids")]
    kept = {**{name: [] for name in texts}, "one": [0], "two": list(range(len(tiles)))}
    flags = re.search(r"image_flags \[([01,]+)\]", golden.entries["flags_ids"]["meaning"]).group(1)
    kept["flags"] = [i for i, flag in enumerate(flags.split(",")) if flag == "1"]
    rows = {}
    for name, numbers in kept.items():
        several = golden.inputs[f"{name}_ids"]
        share = len(numbers) // len(several)
        for i, ids in enumerate(several):
            images = tiles[numbers[share * i : share * (i + 1)]] if share else None
            where = ids == context
            rows[f"{name}.{i}"] = language.at(ids, where, np.arange(where.sum()), images)
    return rows


def spoken(golden: comparison.Golden, ours: vlm_jax.pretrained.Pretrained) -> dict[str, np.ndarray]:
    """Logits, losses and greedy ids."""
    rows, found = prompts(golden), {}
    logits = language.logits(ours, rows)
    for case in dict.fromkeys(name.split(".")[0] for name in rows):
        these = [logits[name] for name in rows if name.startswith(f"{case}.")]
        entry = golden.entries[f"{case}_logits"]
        found[f"{case}_logits"] = np.stack([language.shown(entry, array) for array in these])
        if f"{case}_loss" in golden.expected:
            found[f"{case}_loss"] = language.loss(these, golden.inputs[f"{case}_labels"])
    cases = [name.removesuffix("_greedy") for name in golden.expected if name.endswith("_greedy")]
    count = len(golden.expected[f"{cases[0]}_greedy"])
    ids = language.greedy(ours, {case: rows[f"{case}.0"] for case in cases}, count)
    return found | {f"{case}_greedy": ids[case] for case in cases}


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

"""LLaVA-OneVision 1.5: RICE-ViT on each image alone, its merger and Qwen3."""

import pathlib
import re

import jax
import numpy as np

import vlm_jax
from tests.golden import comparison
from tests.golden.systems import language
from tests.golden.systems.language import Patches, Row
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.rope_2d import rope_2d_angles
from vlm_jax.processors.patches import pack_patches

NOT_COMPARED = {
    r"packed\.merged_as_coded": "the released ds/ code slices packed images wrongly: all but the first are shifted by "
    "a token; its training code, and one image at a time, give what is compared as image<n>.merged",
}
IMAGE = 151_655  # default of the released config


def images_of(inputs: dict[str, np.ndarray]) -> list[Patches]:
    """The patches of every image, in order."""
    ends = np.cumsum(np.prod(inputs["grids"], axis=1))[:-1]
    parts = np.split(inputs["pixels"], ends)
    return [Patches(part, grid[None]) for part, grid in zip(parts, inputs["grids"], strict=True)]


def seen(model, images: list[Patches]) -> dict[str, np.ndarray]:
    """What the tower and the merger make of every image, each in a row of its own, class token first."""
    encoder, connector = model.module.encoder, model.module.connector
    length = max(len(image.patches) for image in images) + encoder.merge_size**2
    packs = [
        pack_patches(*image, merge_size=encoder.merge_size, length=length, class_tokens=encoder.class_tokens)
        for image in images
    ]

    @jax.jit
    def run(params, packed):
        variables = {"params": params["encoder"]}
        features = encoder.apply(variables, packed, collect=True)
        embed = Dense(encoder.width, ("patch", "embed"), use_bias=False)
        return {
            "rotary": rope_2d_angles(packed.positions, encoder.width // encoder.num_heads, encoder.rope_theta),
            "patch_embed": embed.apply({"params": params["encoder"]["patch_embed"]}, packed.patches),
            "hidden": features.hidden.swapaxes(0, 1),
            "unmerged": features.tokens,
            "merged": connector.apply({"params": params["connector"]}, features, deterministic=True).tokens,
        }

    packed = jax.tree.map(lambda *rows: np.concatenate(rows), *packs)
    arrays = jax.tree.map(np.asarray, run(model.params, packed))
    found = {}
    for i, image in enumerate(images):
        count = len(image.patches)
        own = {name: array[i] for name, array in arrays.items()}
        (place,) = np.flatnonzero(packed.class_tokens[i])
        states = own.pop("hidden")[:, [place, *range(count)]]
        named = {
            name: array[: count // (encoder.merge_size**2 if name == "merged" else 1)] for name, array in own.items()
        }
        named |= {"pre_layernorm": states[0]} | {f"block.{n}": state for n, state in enumerate(states[1:])}
        found |= {f"image{i}.{name}": array for name, array in named.items()}
    return found


def num_first(images: list[Patches], merge_size: int, count: int) -> int:
    """How many of the first images have `count` tokens together, where the manifest names no image of a prompt."""
    ends = np.cumsum([0, *(len(image.patches) // merge_size**2 for image in images)])
    (found,) = np.flatnonzero(ends == count)
    return int(found)


def prompts(golden: comparison.Golden, images: list[Patches], image_id: int, merge_size: int) -> dict[str, Row]:
    """Every prompt of the folder by its name, each with the images that the manifest names."""
    rows = {}
    for key in (key for key in golden.entries if key.endswith(".input_ids")):
        (ids,) = golden.inputs[key]
        where = ids == image_id
        shown = [images[number] for number in comparison.named_pictures(golden.entries[key]["meaning"])]
        shown = shown or images[: num_first(images, merge_size, where.sum())]
        patches = Patches(*map(np.concatenate, zip(*shown, strict=True))) if shown else None
        rows[key.removesuffix(".input_ids")] = language.at(ids, where, np.arange(where.sum()), patches)
    return rows


def spoken(model, golden: comparison.Golden, rows: dict[str, Row]) -> dict[str, np.ndarray]:
    """Embeddings, hidden states, logits, losses and greedy ids of every prompt."""
    found = {}
    for name, state in language.states(model, rows).items():
        found |= {f"{name}.inputs_embeds": state.embeddings[None], f"{name}.logits": state.logits[None]}
        found |= {f"{name}.hidden.{i}": hidden[None] for i, hidden in enumerate(state.hidden)}
        if f"{name}.labels" in golden.inputs:
            found[f"{name}.loss"] = language.loss([state.logits], list(golden.inputs[f"{name}.labels"]))
    names = {name: key for name in rows if (key := f"{name}.greedy") in golden.expected}
    counts = {name: golden.expected[key].shape[1] for name, key in names.items()}
    ids = language.greedy(model, {name: rows[name] for name in names}, max(counts.values())) if names else {}
    return found | {names[name]: row[None, : counts[name]] for name, row in ids.items()}


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array that the folder's manifest names."""
    golden = comparison.read(folder)
    model = vlm_jax.from_pretrained(folder)
    images = images_of(inputs)
    rows = prompts(golden, images, model.config.get("image_token_id", IMAGE), model.module.encoder.merge_size)
    found = seen(model, images) | spoken(model, golden, rows)
    return {
        name: np.asarray(array)
        for name, array in found.items()
        if name in golden.expected and not any(re.fullmatch(pattern, name) for pattern in NOT_COMPARED)
    }

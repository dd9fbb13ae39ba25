"""DeepSeek-VL: its towers, SigLIP alone or SAM next to SigLIP, its projector, and Llama after them."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

import vlm_jax
from tests.golden import comparison
from tests.golden.comparison import step
from tests.golden.systems import language
from vlm_jax.encoders.hybrid import Hybrid


def load(folder: pathlib.Path):
    """The folder's checkpoint, under the sizes that it gives to the official names."""
    config = json.loads((folder / "config.json").read_text())
    registry = json.loads((folder / "tiny_registry.json").read_text())
    return vlm_jax.from_pretrained(folder, config={**config, "model_registry": registry})


def hybrid_outputs(ours, images: jax.Array, entries: dict) -> dict[str, jax.Array]:
    module, params = ours.module.encoder, ours.params["encoder"]
    first = images[:1]
    mean, std = (jnp.asarray(values)[None, None, None] for values in module.high_statistics)

    @jax.jit
    def inside(params, images):
        return module.high.apply(
            {"params": params["high"]},
            (images - mean) / std,
            collect=True,
            capture_intermediates=lambda part, _: part.name in ("patch_embed", "neck", "high_res_neck"),
        )

    features, state = inside(params, first)
    grid = module.high.patch_grid(*images.shape[1:3])
    hidden = features.hidden.reshape(-1, 1, *grid, module.high.width)
    parts = {name: value["__call__"][0] for name, value in state["intermediates"].items()}
    found = {f"sam_block{i}": block for i, block in enumerate(hidden[1:])}
    found["sam_patch"] = parts["patch_embed"].reshape(hidden.shape[1:])
    found["sam_neck"] = parts["neck"].transpose(0, 3, 1, 2)
    found["sam_neck_hd"] = parts["high_res_neck"].transpose(0, 3, 1, 2)

    @jax.jit
    def towers(params, images):  # one program, in which every tower runs once
        encoder = params["encoder"]
        without_branch = {**encoder, "high": {**encoder["high"], "high_res_scale": jnp.zeros(1)}}
        high, low = module.apply({"params": encoder}, images)
        found = {"high": high.tokens[:1], "low": low.tokens[:1]}
        found |= {"high_second": high.tokens[1:2], "low_second": low.tokens[1:2]}
        found["high_alpha0"] = module.apply({"params": without_branch}, images)[0].tokens[:1]
        for name, combine in (("feature", "feature"), ("sequence", "sequence"), ("add", "sum")):
            found[f"concat_{name}"] = module.clone(combine=combine).apply({"params": encoder}, images).tokens[:1]
        return {**found, "aligned": ours.module.apply({"params": params}, images, method="visual_tokens").tokens}

    found |= towers(ours.params, images)
    for name in found:
        if name in entries and not name.startswith("sam_"):
            found[name] = found[name][:, :: step(entries[name])]

    class PreparedImage(type(module.low)):  # the low-resolution tower, which also notes its input
        def __call__(self, images, **kwargs):
            self.sow("intermediates", "images", images)
            return super().__call__(images, **kwargs)

    fields = {
        name: getattr(module.low, name) for name in module.low.__dataclass_fields__ if name not in ("parent", "name")
    }
    unnormalised = module.clone(low=PreparedImage(**fields), low_statistics=None)

    @jax.jit
    def resized(params, images):  # the towers after it are left out by the compiler
        state = unnormalised.apply({"params": params}, images, mutable="intermediates")[1]
        return state["intermediates"]["low"]["images"][0]

    every = step(entries["low_images"]) if "low_images" in entries else 1
    small = resized(params, first)
    found["low_images"] = small[:, ::every, ::every].transpose(0, 3, 1, 2)
    return found


def spoken(golden: comparison.Golden, ours, images: np.ndarray) -> dict[str, np.ndarray]:
    """What the language model gives: the rows of every prompt, each with as many images as its tags stand for."""
    inputs, entries = golden.inputs, golden.entries
    cases = [name.removesuffix("_ids") for name in inputs if name.endswith("_ids")]
    said = [*(entries[f"{case}_ids"]["meaning"] for case in cases), (golden.folder / "cases.md").read_text()]
    tag = re.search(r"(?:image tags \(id|images_seq_mask is ids ==) (\d+)", "\n".join(said))
    count = ours.module.connector.num_tokens(ours.module.encoder.grid(*images.shape[1:3]))
    rows = {}
    for case in cases:
        masks = inputs.get(f"{case}_mask", np.ones_like(inputs[f"{case}_ids"])) > 0
        ids = [row[mask] for row, mask in zip(inputs[f"{case}_ids"], masks, strict=True)]
        tags = [row == int(tag.group(1)) if tag else np.zeros(len(row), bool) for row in ids]
        shown = comparison.pictures(entries[f"{case}_ids"], [int(where.sum()) // count for where in tags])
        for i, (row, where, numbers) in enumerate(zip(ids, tags, shown, strict=True)):
            pixels = images[numbers] if numbers else None
            rows[f"{case}.{i}"] = language.at(row, where, np.arange(where.sum()), pixels)
    states, found = language.states(ours, rows), {}
    for case in cases:
        these = language.of_case(states, case)
        for ending, arrays in {
            "logits": [state.logits for state in these],
            "embeds_tail": [state.embeddings for state in these],
        }.items():
            if (name := f"{case}_{ending}") in entries:
                found[name] = language.shown_rows(golden, name, arrays)
    return found | language.greedy_cases(golden, ours, rows, "_greedy")


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array of the folder."""
    golden = comparison.read(folder)
    entries = golden.entries
    ours, pixels = load(folder), jnp.asarray(inputs["images_u8"], jnp.float32)
    if isinstance(ours.module.encoder, Hybrid):
        pixels = pixels / 255
        found = hybrid_outputs(ours, pixels, entries)
    else:
        pixels = pixels / 127.5 - 1
        tokens = jax.jit(lambda x: ours.apply(x, method="visual_tokens").tokens)
        features = jax.jit(ours.module.encoder.apply)({"params": ours.params["encoder"]}, pixels)
        found = {"vision": features.tokens, "aligned": tokens(pixels)}
    found |= spoken(golden, ours, np.asarray(pixels))
    return {name: np.asarray(value) for name, value in found.items() if name in entries}

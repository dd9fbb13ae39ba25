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
    """Outputs of the language model: for one image, and for a batch of two images and one."""
    inputs, entries = golden.inputs, golden.entries
    tag = int(re.search(r"image tags \(id (\d+)\)", entries["one_ids"]["meaning"]).group(1))
    prompts = {"one": (inputs["one_ids"][0], images[:1])}
    for i, (ids, mask) in enumerate(zip(inputs["batch_ids"], inputs["batch_mask"] > 0, strict=True)):
        prompts[f"batch.{i}"] = (ids[mask], images[i:])  # images 0 and 1, and image 1
    rows = {
        name: language.at(ids, ids == tag, np.arange((ids == tag).sum()), pixels)
        for name, (ids, pixels) in prompts.items()
    }
    states = language.states(ours, rows)
    count = len(golden.expected["one_greedy"])
    return {
        "one_embeds_tail": language.shown(entries["one_embeds_tail"], states["one"].embeddings)[None],
        "one_logits": language.shown(entries["one_logits"], states["one"].logits)[None],
        "batch_logits": np.stack(
            [language.shown(entries["batch_logits"], states[name].logits) for name in rows if name.startswith("batch.")]
        ),
        "one_greedy": language.greedy(ours, {"one": rows["one"]}, count)["one"],
    }


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

"""DeepSeek-VL's towers, SigLIP alone or SAM beside SigLIP, and its projector."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import vlm_jax
from tests.golden.comparison import step
from vlm_jax.encoders.hybrid import Hybrid

LANGUAGE = "the language model, which the package does not load so far"
NOT_COMPARED = {
    r".*_embeds_tail": "rows of the language model's embedding table, with visual tokens between: " + LANGUAGE,
    r".*_logits|.*_greedy": LANGUAGE,
}


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

    def combined(combine):
        return jax.jit(lambda params, images: module.clone(combine=combine).apply({"params": params}, images))

    high, low = combined("tuple")(params, images)
    found |= {"high": high.tokens[:1], "low": low.tokens[:1]}
    found |= {"high_second": high.tokens[1:2], "low_second": low.tokens[1:2]}
    without_branch = {**params, "high": {**params["high"], "high_res_scale": jnp.zeros(1)}}
    found["high_alpha0"] = combined("tuple")(without_branch, first)[0].tokens
    for name, combine in (("feature", "feature"), ("sequence", "sequence"), ("add", "sum")):
        found[f"concat_{name}"] = combined(combine)(params, first).tokens
    found["aligned"] = jax.jit(ours.apply)(images).tokens
    for name in found:
        if name in entries and not name.startswith("sam_"):
            found[name] = found[name][:, :: step(entries[name])]

    class Seen(type(module.low)):  # the low-resolution tower, which also notes its input
        def __call__(self, images, **kwargs):
            self.sow("intermediates", "images", images)
            return super().__call__(images, **kwargs)

    fields = {
        name: getattr(module.low, name) for name in module.low.__dataclass_fields__ if name not in ("parent", "name")
    }
    unnormalised = module.clone(low=Seen(**fields), low_statistics=None)
    _, state = unnormalised.apply({"params": params}, first, mutable="intermediates")
    every = step(entries["low_images"]) if "low_images" in entries else 1
    (small,) = state["intermediates"]["low"]["images"]
    found["low_images"] = small[:, ::every, ::every].transpose(0, 3, 1, 2)
    return found


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array of the folder before the language model."""
    entries = json.loads((folder / "golden.json").read_text())["arrays"]
    ours, pixels = load(folder), jnp.asarray(inputs["images_u8"], jnp.float32)
    if isinstance(ours.module.encoder, Hybrid):
        found = hybrid_outputs(ours, pixels / 255, entries)
    else:
        pixels = pixels / 127.5 - 1
        features = jax.jit(ours.module.encoder.apply)({"params": ours.params["encoder"]}, pixels)
        found = {"vision": features.tokens, "aligned": jax.jit(ours.apply)(pixels).tokens}
    return {name: np.asarray(value) for name, value in found.items() if name in entries}

"""vision_transformer (vit_jax): ViTs, hybrids, position tables at other sizes, figure 7 of the paper."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tests.analysis.vit_definitions import NAMES, definitions
from vlm_jax import from_pretrained
from vlm_jax.checkpoints.hub import read_config
from vlm_jax.layers.resize import resize

Outputs = dict[str, Any]


def normalise(images: np.ndarray) -> jax.Array:
    """(x - 127.5) / 127.5, as the release's input pipeline does."""
    return jnp.asarray((images.astype(np.float32) - 127.5) / 127.5)


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> Outputs:
    """Every output array that the folder's manifest names."""
    manifest = json.loads((folder / "golden.json").read_text())["arrays"]
    wanted = {name: entry["shape"] for name, entry in manifest.items() if entry["role"] == "output"}
    if "images_u8" not in inputs:
        return _tables(inputs, wanted)
    loaded, images = from_pretrained(folder), normalise(inputs["images_u8"])
    encoder, params = loaded.module.encoder, loaded.params["encoder"]

    @jax.jit
    def run(params, images):
        features = encoder.apply({"params": params["encoder"]}, images, collect=True)
        first = features.hidden[:, :1]
        blocks = {f"block{i}": hidden for i, hidden in enumerate(first[1:])}
        logits = loaded.module.apply({"params": params}, images)
        return {"embedded": first[0], **blocks, "pre_logits": features.pooled, "logits": logits}

    found = run(loaded.params, images)
    if encoder.stem_layers is not None:
        found = {**found, **_stem(encoder, params, images)}
    for name, array in inputs.items():
        if match := re.fullmatch(r"(\D+(\d+))_image_u8", name):
            found |= _resized(folder, match.group(1), int(match.group(2)), normalise(array))
    for kind in ("unpooled", "token_unpooled"):
        if f"{kind}_logits" in wanted:
            config = {**read_config(folder), "classifier": kind}
            found[f"{kind}_logits"] = from_pretrained(folder, config=config).apply(images[:1])
    if any(NAMES.fullmatch(name) for name in wanted):
        found |= definitions(folder, encoder, params, images)
    return {name: np.asarray(found[name]) for name in wanted}


def _stem(encoder: nn.Module, params: Any, images: jax.Array) -> Outputs:
    """Maps of the first image on the way to the patches."""

    @jax.jit
    def run(params, images):
        return encoder.apply({"params": params}, images, mutable=["intermediates"], capture_intermediates=True)[1]

    sown = run(params, images[:1])["intermediates"]
    maps = {name: value["__call__"][0] for name, value in sown["stem"].items() if name != "__call__"}
    grid = encoder.grid(*images.shape[1:3])
    stages = {f"block{stage}": maps[f"stage{stage}_unit{count}"] for stage, count in enumerate(encoder.stem_layers, 1)}
    return {
        "conv_root": maps["conv_root"][:, ::2, ::2],
        "gn_root": maps["norm_root"],
        **stages,
        "embedding": sown["patch_embed"]["__call__"][0].reshape(1, *grid, -1),
    }


def _resized(folder: Path, prefix: str, side: int, images: jax.Array) -> Outputs:
    """The model loaded for another image size."""
    loaded = from_pretrained(folder, image_size=side)
    params = loaded.params["encoder"]
    table = params["positions"]["table"]
    if "class_position" in params:
        table = jnp.concatenate([params["class_position"], table])
    run = jax.jit(lambda p, x: loaded.module.encoder.apply({"params": p}, x).pooled)
    return {
        f"{prefix}_posemb": table[None],
        f"{prefix}_pre_logits": run(params, images),
        f"{prefix}_logits": jax.jit(loaded.apply)(images),
    }


def _tables(inputs: dict[str, np.ndarray], wanted: dict[str, list[int]]) -> Outputs:
    """Position tables alone; one whose rows are not a square number has a class token's row first."""
    found = {}
    for name, (_, rows, _) in wanted.items():
        table = inputs[f"{name.split('_')[0]}_in"][0]
        has_class = int(len(table) ** 0.5) ** 2 != len(table)
        old, new = (int((count - has_class) ** 0.5) for count in (len(table), rows))
        square = resize(table[has_class:].reshape(old, old, -1), (new, new), "corner_linear")
        found[name] = np.concatenate([table[:has_class], np.asarray(square).reshape(new * new, -1)])[None]
    return found

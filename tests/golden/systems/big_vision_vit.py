"""big_vision's ViT: positions, heads, other sizes, and the older files of vision_transformer."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from tests.golden.systems.vision_transformer import normalise
from vlm_jax import from_pretrained
from vlm_jax.layers.attention import MultiHeadAttention
from vlm_jax.layers.position_embedding import sincos_2d
from vlm_jax.pretrained import Pretrained

Outputs = dict[str, Any]


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> Outputs:
    """Every output array that the folder's manifest names."""
    manifest = json.loads((folder / "golden.json").read_text())["arrays"]
    wanted = {name: entry for name, entry in manifest.items() if entry["role"] == "output"}
    loaded, images = from_pretrained(folder), normalise(inputs["images_u8"])
    found = _layers(loaded, images)
    for name in ("pool_0_logits", "pool_none_logits"):
        if name in wanted:
            pooling = "token" if name == "pool_0_logits" else "none"
            model = loaded.module.clone(encoder=loaded.module.encoder.clone(pooling=pooling))
            found[name] = jax.jit(model.apply)({"params": loaded.params}, images)[: wanted[name]["shape"][0]]
    for name, array in inputs.items():
        if match := re.fullmatch(r"res(\d+)_image_u8", name):
            resized = from_pretrained(folder, image_size=int(match.group(1)))
            found[f"res{match.group(1)}_logits"] = jax.jit(resized.apply)(normalise(array))
            if "positions" in resized.params["encoder"]:
                found[f"res{match.group(1)}_posemb"] = resized.params["encoder"]["positions"]["table"][None]
    if "sincos" in wanted:
        rows, cols, width = map(int, re.search(r"\((\d+), *(\d+), *(\d+)\)", wanted["sincos"]["meaning"]).groups())
        found["sincos"] = sincos_2d((rows, cols), width)[None]
    if "old_checkpoint_logits" in wanted:
        found |= _old_checkpoint(_beside(folder, "vit_jax_token"))
    return {name: np.asarray(found[name]) for name in wanted}


def _beside(folder: Path, system: str) -> Path:
    """The folder of another system in the same root; of several the one that is named as `folder` is."""

    def system_of(manifest: Path) -> str:
        return json.loads(manifest.read_text())["system"]

    found = [path.parent for path in sorted(folder.parent.glob("*/golden.json")) if system_of(path) == system]
    own_name = folder.name.replace(system_of(folder / "golden.json"), system)
    return next((path for path in found if path.name == own_name), found[0])


def _layers(loaded: Pretrained, images: jax.Array) -> Outputs:
    encoder = loaded.module.encoder

    @jax.jit
    def run(params, images):
        own = {"params": params["encoder"]}
        features, sown = encoder.apply(
            own,
            images,
            collect=True,
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, MultiHeadAttention),
        )
        attended = sown["intermediates"]["blocks"]["layers"]["attention"]["__call__"][0][0]
        headless = encoder.clone(representation_size=None)
        tokens = headless.clone(keep_class_token=True, pooling="none").apply(own, images[:1]).tokens
        every = loaded.module.clone(encoder=encoder.clone(pooling="none"))
        logits_2d = every.apply({"params": params}, images[:1])
        found = {
            "with_posemb": features.hidden[0, :1, int(encoder.class_token) :],
            "encoded": tokens,
            "head_input": headless.apply(own, images).pooled,
            "pre_logits": features.pooled,
            "logits": loaded.module.apply({"params": params}, images),
            "logits_2d": logits_2d.reshape(1, *features.grid, -1),
        }
        for i, hidden in enumerate(features.hidden[1:, :1]):
            found |= {f"block{i}_out": hidden, f"block{i}_sa": attended[i, :1]}
        return found

    return run(loaded.params, images)


def _old_checkpoint(folder: Path) -> Outputs:
    """A file of vision_transformer, whose class token has a row of the position table."""
    images = normalise(comparison.read(folder).inputs["images_u8"])
    loaded = from_pretrained(folder)
    params = loaded.params["encoder"]
    return {
        "old_checkpoint_logits": jax.jit(loaded.apply)(images),
        "old_checkpoint_cls": (params["class_token"] + params["class_position"])[None],
        "old_checkpoint_posemb": jnp.asarray(params["positions"]["table"])[None],
    }

"""InternVL's InternViT and projector; a selected layer may leave out the last hidden state."""

import json
import pathlib

import jax
import numpy as np

import vlm_jax
from tests.golden import comparison
from tests.golden.systems.pixels import IMAGENET, normalised

LANGUAGE = "the language model, which the package does not load so far"
NOT_COMPARED = {r".*_logits|.*_loss|.*_greedy": LANGUAGE}


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every vision array of the folder."""
    config = json.loads((folder / "config.json").read_text())
    whole = vlm_jax.from_pretrained(folder, config={**config, "select_layer": -1})
    tile = normalised(inputs["tiles_u8"][:1], IMAGENET)
    encoder = whole.module.encoder
    run = jax.jit(lambda params, x: encoder.apply({"params": params}, x, collect=True).hidden)
    hidden = run(whole.params["encoder"], tile)
    found = {"vit_embeddings": hidden[0], "vit_layer1": hidden[1], "vit_last": hidden[-1]}
    selected = vlm_jax.from_pretrained(folder)
    tokens = jax.jit(lambda x: selected.apply(x).tokens)
    for name, images in {"features": "tiles_u8", "big_features": "big_u8"}.items():
        if images in inputs:
            found[name] = tokens(normalised(inputs[images], IMAGENET))
    expected = comparison.read(folder).expected
    return {name: np.asarray(value) for name, value in found.items() if name in expected}

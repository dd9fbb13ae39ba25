"""InternVL's InternViT: embeddings, layers, and the last hidden state, which a selected layer may leave out."""

import json
import pathlib

import jax
import numpy as np

import vlm_jax
from tests.golden.systems.pixels import IMAGENET, normalised

PROJECTOR = "the projector, which the package does not load so far"
LANGUAGE = "the language model, which the package does not load so far"
NOT_COMPARED = {"(big_)?features": PROJECTOR, r".*_logits|.*_loss|.*_greedy": LANGUAGE}


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every vision array of the folder."""
    config = json.loads((folder / "config.json").read_text())
    whole = vlm_jax.from_pretrained(folder, config={**config, "select_layer": -1})
    tile = normalised(inputs["tiles_u8"][:1], IMAGENET)
    hidden = jax.jit(lambda x: whole.apply(x, collect=True).hidden)(tile)
    found = {"vit_embeddings": hidden[0], "vit_layer1": hidden[1], "vit_last": hidden[-1]}
    return {name: np.asarray(value) for name, value in found.items()}

"""Ovis 2's vision tower (AIMv2), official and as ported to transformers.

The tower is given the official pixels, which the folder of the official code lists as an output of its
image processor.
"""

import pathlib

import jax
import numpy as np

import vlm_jax
from tests.golden import comparison
from vlm_jax.layers.norm import Norm

VOCABULARY = "the visual vocabulary (its head, its tokens, its table) is a connector, which the package lacks so far"
NOT_COMPARED = {
    r"img\.\d+\.placeholders": "how prompts name the parts of an image: chat layout, not the tower",
    r"pixel_values": "Ovis 2's image processor, not part of the tower, which is given these pixels",
    r"vt\.(head_logits|tokens\..*|argmax)": VOCABULARY,
    r"vte\..*": VOCABULARY,
    r"(gumbel|st)\..*": VOCABULARY,
    r"mm\..*": "the whole system: needs the visual vocabulary and the language model",
}


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every vision array that the folder's manifest names."""
    expected = comparison.read(folder).expected
    pixels = (inputs if "pixel_values" in inputs else expected)["pixel_values"].transpose(0, 2, 3, 1)
    model = vlm_jax.from_pretrained(folder)

    apply = jax.jit(lambda params, pixels: model.module.apply({"params": params}, pixels, collect=True))
    features = apply(model.params, pixels)
    found = {"vt.features": features.tokens, "vit.embeddings": features.hidden[0]}
    found |= {f"vit.block.{i}": state for i, state in enumerate(features.hidden[1:])}
    if "vit.last_hidden_state" in expected:  # behind a norm that the tower has no use for
        scale = model.checkpoint["visual_tokenizer.backbone.trunk.post_trunk_norm.weight"][...]
        norm = Norm("rms", model.module.norm_epsilon)
        found["vit.last_hidden_state"] = norm.apply({"params": {"scale": scale}}, features.hidden[-1])
    return {name: np.asarray(array) for name, array in found.items() if name in expected}

"""Ovis 2.5's vision tower, all layers full or with windows, and its visual vocabulary.

The tower is given the official patches, which the folder lists as outputs of the image processor.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import vlm_jax
from tests.golden import comparison
from vlm_jax.encoders.packed import window_in_blocks
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.neighbours import squares
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.resampled_positions import ResampledPositions
from vlm_jax.layers.rope_2d import rope_2d_angles
from vlm_jax.pretrained.ovis import NAVIT_DEFAULTS
from vlm_jax.processors.patches import pack, window_of_blocks
from vlm_jax.types import VisualFeatures

PROCESSOR = "Ovis 2.5's image processor, not part of the tower, which is given these patches"
SYSTEM = "the whole system: needs the language model"
NOT_COMPARED = {
    r"(vit|video)\.(pixel_values|grid_thws)": PROCESSOR,
    r"mm\d*\.grid_thws": PROCESSOR,
    r"(text|chat|sft|batch)\..*": "language model and chat template: no array of the tower",
    r"mm\d*\.(?!grid_thws).*": SYSTEM,
    r"video\.(input_ids|logits|generated)": SYSTEM,
    r"grad\..*": "gradients of the language model's loss: " + SYSTEM,
}
# Arrays of the same weights under other settings -> the fields of the module that differ.
VARIANTS = {
    "vit.norope_last_layer": {"use_rope": False},
    "vit.nope_last_layer": {"table_side": None},
    "vit.fullattn_last_layer": {"full_layers": None, "window_size": None},
}


class Tower:
    """The loaded tower on the packed patches of one of the folder's inputs."""

    def __init__(self, model, patches, grids):
        self.model, self.patches, self.grids = model, patches, grids
        self.module, self.params = model.module.encoder, model.params["encoder"]

    def packed(self, window):
        return pack(self.patches, self.grids, merge_size=self.module.merge_size, window=window)

    def encode(self, **fields):
        """The features, and [depth + 1, patches, width] of the blocks, in the processor's order."""
        module = self.module.clone(**fields)
        apply = jax.jit(lambda params, packed: module.apply({"params": params}, packed, collect=True))
        features = apply(self.params, self.packed(module.window))
        return features, features.hidden[:, 0, : len(self.patches)]


def _embeddings(tower: Tower) -> dict[str, np.ndarray]:
    """The parts of the embeddings, each by the layer that makes it."""
    module, params, packed = (
        tower.module,
        tower.params,
        jax.tree.map(jnp.asarray, tower.packed(None)),
    )
    embed = Dense(module.width, ("patch", "embed"))
    found = {
        "vit.patch_embed": embed.apply({"params": params["patch_embed"]}, packed.patches),
        "vit.rope_angles": rope_2d_angles(packed.positions, module.width // module.num_heads, module.rope_theta),
    }
    if module.table_side is not None:
        table = ResampledPositions(module.table_side, module.width)
        found["vit.pos_embed"] = table.apply({"params": params["positions"]}, packed.positions, packed.sizes)
    return {name: array[0] for name, array in found.items()}


def _windows(tower: Tower, config: dict) -> dict[str, np.ndarray]:
    """The order of blocks by window, which the release computes for full attention as well."""
    module = tower.module
    size = {**NAVIT_DEFAULTS, **config["vit_config"]}["window_size"]
    windows = window_of_blocks(
        tower.grids, module.merge_size, window_in_blocks(size, module.patch_size, module.merge_size)
    )
    return {
        "vit.window_index": np.argsort(windows, kind="stable"),
        "vit.cu_window_seqlens": np.cumsum(np.bincount(windows)) * module.merge_size**2,
    }


def _normed(model, x) -> np.ndarray:
    """The last norm, which the tower has no use for."""
    name = "visual_tokenizer.vit.vision_model.post_layernorm"
    params = {
        ours: model.checkpoint[f"{name}.{theirs}"][...] for ours, theirs in (("scale", "weight"), ("bias", "bias"))
    }
    return Norm("layer", model.module.encoder.norm_epsilon).apply({"params": params}, x)


def _vocabulary(model, features: VisualFeatures) -> dict[str, np.ndarray]:
    """Arrays behind the tower, of the squares that are real, by the official names of an image's."""
    connector, variables = model.module.connector, {"params": model.params["connector"]}

    def head(part, _):
        return part.name == "head"

    (logits, mask), state = connector.apply(variables, features, method="logits", capture_intermediates=head)
    words = connector.apply(variables, logits, deterministic=True, method="words")
    merged = squares(features, connector.factor, "")[0]
    found = {
        "vt.features": merged.reshape(*merged.shape[:2], -1),
        "vt.head_linear": state["intermediates"]["head"]["__call__"][0],
        "vt.head_logits": logits,
        "vt.tokens": jnp.pad(words, ((0, 0), (0, 0), (0, connector.num_indicators))),
        "vte.visual_embeds": connector.apply(variables, features, deterministic=True).tokens,
    }
    return {name: array[mask] for name, array in found.items()}


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every vision array that the folder's manifest names."""
    del inputs  # pixels before the image processor, and text
    expected = comparison.read(folder).expected
    config = json.loads((folder / "config.json").read_text())
    model = vlm_jax.from_pretrained(folder)
    tower = Tower(model, expected["vit.pixel_values"], expected["vit.grid_thws"])
    features, hidden = tower.encode()
    found = {
        **_embeddings(tower),
        **_windows(tower, config),
        **_vocabulary(model, features),
        "vte.indicators": model.module.connector.apply({"params": model.params["connector"]}, method="indicators"),
        "vit.embeddings": hidden[0],
    }
    found |= {f"vit.layer.{i}": state for i, state in enumerate(hidden[1:])}
    found["vit.last_hidden_state"] = _normed(model, hidden[-1])
    for name in VARIANTS.keys() & expected.keys():
        found[name] = tower.encode(**VARIANTS[name])[1][-1]
    if "video.tokens" in expected:
        video = Tower(model, expected["video.pixel_values"], expected["video.grid_thws"])
        found["video.tokens"] = _vocabulary(model, video.encode()[0])["vt.tokens"]
    return {name: np.asarray(array) for name, array in found.items() if name in expected}

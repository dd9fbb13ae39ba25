"""Ovis 2.5: its vision tower, all layers full or with windows, its visual vocabulary and Qwen3.

The model is given the official patches, which the folder lists as outputs of the image processor.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import vlm_jax
from tests.golden import comparison
from tests.golden.systems import language, ovis_prompts
from tests.golden.systems.language import Patches, Row
from vlm_jax.checkpoints.params import export_params
from vlm_jax.encoders.packed import window_in_blocks
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.resampled_positions import ResampledPositions
from vlm_jax.layers.rope_2d import rope_2d_angles
from vlm_jax.layers.squares import squares
from vlm_jax.pretrained.ovis import NAVIT_DEFAULTS
from vlm_jax.processors.patches import pack_patches, window_of_blocks
from vlm_jax.types import VisualFeatures

NOT_COMPARED = {
    r"text\.input_ids": "ids drawn at random, which no text gives and other arrays are made of",
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
        return pack_patches(self.patches, self.grids, merge_size=self.module.merge_size, window=window)

    def encode(self, **fields):
        """The features, and [depth + 1, patches, width] of the blocks, in the processor's order."""
        module = self.module.clone(**fields)
        apply = jax.jit(lambda params, packed: module.apply({"params": params}, packed, collect=True))
        features = jax.tree.map(np.asarray, apply(self.params, self.packed(module.window)))
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
    """Arrays after the tower, of the squares that are real, by the official names of an image's."""
    connector = model.module.connector

    def head(part, _):
        return part.name == "head"

    @jax.jit
    def run(params, features):
        variables = {"params": params}
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
        return found, mask

    found, mask = jax.tree.map(np.asarray, run(model.params["connector"], jax.tree.map(jnp.asarray, features)))
    return {name: array[mask] for name, array in found.items()}


ATOM, FIRST_INDICATOR, VIDEO = -300, -301, -303  # of the released code, which counts indicators downwards


def prompts(model, golden: comparison.Golden) -> dict[str, Row]:
    """Every prompt of the folder, in the rows of the visual table: indicators first, then its images in order."""
    arrays, rows = {**golden.inputs, **golden.expected}, {}
    every = Patches(arrays["vit.pixel_values"], arrays["vit.grid_thws"])
    for name in (name.removesuffix(".logits") for name in golden.expected if name.endswith(".logits")):
        ids = arrays[f"{name}.input_ids"][0]
        if (ids == VIDEO).any():
            patches = Patches(arrays["video.pixel_values"], arrays["video.grid_thws"])
        else:
            patches = chosen(every, ovis_prompts.shown_pictures(golden, name, int((ids == FIRST_INDICATOR).sum())))
        rows[name] = row(model, ids, patches)
    if "sft.loss" in golden.expected:
        ids = arrays["sft.input_ids"][0]
        shown = ovis_prompts.shown_pictures(golden, "sft", int((ids == FIRST_INDICATOR).sum()))
        rows["sft"] = row(model, ids, chosen(every, shown))
    return rows


def chosen(patches: Patches, numbers: list[int]) -> Patches | None:
    """The patches of some of the images, None of none."""
    ends = np.cumsum(np.prod(patches.grids, axis=1))[:-1]
    parts = np.split(patches.patches, ends)
    return Patches(np.concatenate([parts[i] for i in numbers]), patches.grids[numbers]) if numbers else None


def row(model, ids: np.ndarray, patches: Patches | None) -> Row:
    """A prompt of the released code's ids."""
    index = np.where(ids < ATOM, FIRST_INDICATOR - ids, -1)
    index[ids == ATOM] = model.module.connector.num_indicators + np.arange((ids == ATOM).sum())
    return Row(np.maximum(ids, 0), index, patches)


def spoken(model, golden: comparison.Golden) -> dict[str, np.ndarray]:
    """Embeddings, hidden states, logits, losses and greedy ids of every prompt."""
    arrays = {**golden.inputs, **golden.expected}
    rows, found = prompts(model, golden), {}
    official = {name: arrays[key][0] for name in rows if (key := f"{name}.inputs_embeds") in arrays}
    states = language.states(model, rows, official)
    for name, state in states.items():
        found |= {f"{name}.inputs_embeds": state.embeddings[None], f"{name}.logits": state.logits[None]}
        found |= {f"{name}.hidden.{i}": hidden[None] for i, hidden in enumerate(state.hidden)}
        if f"{name}.labels" in arrays:
            found[f"{name}.loss"] = language.loss([state.logits], [arrays[f"{name}.labels"][0]])
    names = [name for name in rows if f"{name}.generated" in golden.expected]
    counts = {name: golden.expected[f"{name}.generated"].shape[1] for name in names}
    ids = language.greedy(model, {name: rows[name] for name in names}, max(counts.values()))
    found |= {f"{name}.generated": ids[name][None, :count] for name, count in counts.items()}
    together = {name: rows[name] for name in ovis_prompts.batched(golden)}
    labels = arrays["batch.labels"][:, : max(map(len, together.values()))]
    return found | _gradients(model, together, official, labels)


def _gradients(model, rows: dict[str, Row], official: dict, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The loss of a batch, and its gradients under the released names of the parameters."""

    @jax.jit
    @jax.value_and_grad
    def run(params, *inputs):
        logits = model.module.apply({"params": params}, *inputs, method=language.forward)[-1]
        return language.loss(logits, labels)

    value, gradients = run(model.params, *language.forward_inputs(model, rows, official))
    # Every operation of these rules moves numbers about, so that it takes gradients where it takes parameters.
    released = export_params(model.release.rules, gradients)
    return {"batch.loss": value, **{f"grad.{name}": array for name, array in released.items()}}


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array that the folder's manifest names."""
    del inputs  # read with the rest
    golden = comparison.read(folder)
    expected = golden.expected
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
    found["vit.last_hidden_state"] = _normed(model, jnp.asarray(hidden[-1]))
    for name in VARIANTS.keys() & expected.keys():
        found[name] = tower.encode(**VARIANTS[name])[1][-1]
    if "video.tokens" in expected:
        video = Tower(model, expected["video.pixel_values"], expected["video.grid_thws"])
        found["video.tokens"] = _vocabulary(model, video.encode()[0])["vt.tokens"]
    found |= spoken(model, golden) | ovis_prompts.outputs2_5(golden, config)
    return {name: np.asarray(array) for name, array in found.items() if name in expected}

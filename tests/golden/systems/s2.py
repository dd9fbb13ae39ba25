"""S² around simple fixed functions, and around a SigLIP tower."""

import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import vlm_jax
from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.encoders.multiscale import MultiScale, split_chessboard
from vlm_jax.layers.resize import resize
from vlm_jax.types import VisualFeatures


class Fixed(nn.Module):
    """An encoder that is a function of non-overlapping windows: [B, r, c, side, side, channels] -> width.

    Attributes:
      side: of a window in pixels.
      features: output width.
      function: of the cut windows.
      prefix: of the windows' features [B, N, D]: tokens to go first, or None.
    """

    side: int
    features: int
    function: Callable
    prefix: Callable | None = None

    num_blocks = 0

    def grid(self, height, width):
        return height // self.side, width // self.side

    def __call__(self, images):
        grid = self.grid(*images.shape[1:3])
        x = images.reshape(len(images), grid[0], self.side, grid[1], self.side, -1).transpose(0, 1, 3, 2, 4, 5)
        tokens = self.function(x).reshape(len(images), -1, self.features)
        if self.prefix is not None:
            tokens = jnp.concatenate([self.prefix(tokens), tokens], axis=1)
            grid = (1, tokens.shape[1])
        return VisualFeatures(tokens, jnp.ones(tokens.shape[:2], bool), grid)


class HiddenState(nn.Module):
    """A ViT's hidden state, by a negative index, instead of its output."""

    vit: nn.Module
    index: int

    @property
    def features(self):
        return self.vit.width

    @property
    def num_blocks(self):
        return self.vit.num_blocks

    def grid(self, height, width):
        return self.vit.grid(height, width)

    def __call__(self, images):
        features = self.vit(images, collect=True)
        return VisualFeatures(features.hidden[self.index], features.mask, features.grid)


def multiscale(encoder: nn.Module, call: dict) -> MultiScale:
    """The official function's keyword arguments as fields. How splits are batched changes no number."""
    known = {"model", "scales", "img_sizes", "max_split_size", "resize_output_to_idx", "num_prefix_token",
             "output_shape", "split_forward"}  # fmt: skip
    assert set(call) <= known, f"unknown arguments {set(call) - known}"
    return MultiScale(
        encoder,
        scales=tuple(call.get("scales", ())),
        image_sizes=tuple((size, size) for size in call.get("img_sizes", ())),
        max_split_size=call.get("max_split_size"),
        resize_output_to=call.get("resize_output_to_idx", 0),
    )


def fixed_encoders(folder: pathlib.Path) -> dict[str, Fixed]:
    """The models that `cases.md` defines, by the names in `calls.json`."""
    weights = {name: jnp.asarray(tensor[...]) for name, tensor in open_checkpoint(folder).items()}
    patch, prefix, conv = (weights[f"{name}.weight"] for name in ("patch", "prefix", "conv"))
    side = conv.shape[-1]

    def tanh_of_patch(x):
        x = x.transpose(0, 1, 2, 5, 3, 4)  # a patch is flattened in (channel, row, column) order
        return jnp.tanh(x.reshape(*x.shape[:3], -1) @ patch)

    def silu_of_conv(x):
        return jax.nn.silu(jnp.einsum("brchwi,oihw->brco", x, conv))

    def front(count):
        return lambda tokens: prefix[None, :count] * (1 + tokens.mean(1, keepdims=True))

    return {
        "bnc": Fixed(side, patch.shape[1], tanh_of_patch),
        "bnc with prefix": Fixed(side, patch.shape[1], tanh_of_patch, front(len(prefix))),
        "bnc with first prefix token only": Fixed(side, patch.shape[1], tanh_of_patch, front(1)),
        "bchw": Fixed(side, conv.shape[0], silu_of_conv),
    }


def simple_outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray], entries: dict) -> dict:
    arrays = {name: jnp.asarray(array).transpose(0, 2, 3, 1) for name, array in inputs.items()}
    encoders, found = fixed_encoders(folder), {}
    for name, call in json.loads((folder / "calls.json").read_text())["calls"].items():
        features = jax.jit(multiscale(encoders[call["model"]], call).apply)({}, arrays["x"])
        found[name] = features.tokens
        if call.get("output_shape") == "bchw":
            maps = features.tokens.reshape(len(features.tokens), *features.grid, -1)
            found[name] = maps.transpose(0, 3, 1, 2)
    for name, entry in entries.items():
        if name.startswith("bicubic_"):
            count, channels, rows, cols = entry["shape"]
            found[name] = resize(arrays["x"][:count, ..., :channels], (rows, cols), "bicubic").transpose(0, 3, 1, 2)
        elif name.endswith("_split"):
            image = arrays[name.replace("_split", "_in")]
            splits = (image.shape[1] // entry["shape"][2], image.shape[2] // entry["shape"][3])
            found[name] = split_chessboard(image, splits).transpose(0, 3, 1, 2)
    return found


def siglip_outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict:
    ours = vlm_jax.from_pretrained(folder)
    images = jnp.asarray(inputs["image_u8"], jnp.float32) / 255 * 2 - 1
    features = jax.jit(lambda x: ours.apply(x, collect=True))(images)
    found = {"last_hidden": features.tokens, "pooled": features.pooled, "hidden_m2": features.hidden[-2]}
    encoders = {
        "last_hidden_state": (ours.module, ours.params),
        "hidden_states[-2]": (HiddenState(ours.module, -2), {"vit": ours.params}),
    }
    for name, call in json.loads((folder / "calls.json").read_text())["calls"].items():
        encoder, params = encoders[call["model"]]
        module = multiscale(encoder, call)
        found[name] = jax.jit(module.apply)({"params": {"encoder": params}}, images).tokens
    return found


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array of either kind of folder; a folder with a config holds a SigLIP tower."""
    entries = json.loads((folder / "golden.json").read_text())["arrays"]
    if (folder / "config.json").exists():
        found = siglip_outputs(folder, inputs)
    else:
        found = simple_outputs(folder, inputs, entries)
    return {name: np.asarray(value) for name, value in found.items()}

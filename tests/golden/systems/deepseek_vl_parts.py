"""Single functions of DeepSeek-VL: relative positions and windows."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np

from vlm_jax.encoders.sam import partition_windows, relative_positions

PROJECTOR = "a projector works on an encoder's features; the array has no encoder in it"
NOT_COMPARED = {
    r"(split|mlp)\d+_y": PROJECTOR,
    "linear_y": PROJECTOR,
    r"pre\d+_out": "the image processor's resize and padding, before any encoder",
}


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`rel*_out` and `win_out`; the sizes are those of the arrays asked for."""
    entries = json.loads((folder / "golden.json").read_text())["arrays"]
    found = {}
    for name, entry in entries.items():
        stem = name.removesuffix("_out")
        if name == stem or entry["role"] != "output":
            continue
        if stem.startswith("rel"):
            queries, keys, _ = entry["shape"]
            found[name] = relative_positions(jnp.asarray(inputs[f"{stem}_in"]), queries, keys)
        elif stem.startswith("win"):
            found[name] = partition_windows(jnp.asarray(inputs[f"{stem}_in"]), entry["shape"][1])
    return {name: np.asarray(value) for name, value in found.items()}

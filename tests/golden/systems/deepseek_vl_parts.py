"""Parts of DeepSeek-VL alone: relative positions, windows and projectors."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tests.golden.systems.pixels import CLIP, HALF
from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.checkpoints.params import import_params
from vlm_jax.encoders.sam import partition_windows, relative_positions
from vlm_jax.pretrained.projector import mlp_projector
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.templates import DEEPSEEK
from vlm_jax.types import VisualFeatures

# By the first letters of an array's meaning.
STATISTICS = {"CLIP": CLIP, "0.5": HALF}


def prepared(image: np.ndarray, meaning: str) -> np.ndarray:
    """One image under the settings of its meaning."""
    side, least, normalise, name = re.search(
        r"image_size=(\d+), min_size=(\d+), do_normalize=(\w+), mean/std (\S+)\)", meaning
    ).groups()
    mean, std = STATISTICS[name]
    colour = tuple(int(255 * value) for value in mean)
    pixels = Pixels(mean, std) if normalise == "True" else Pixels()
    views = SquareViews(pixels, (int(side),) * 2, 1, "shrink", background=colour, min_size=int(least))
    return views.images([Image.fromarray(image)])[0].pixels[0].transpose(2, 0, 1)


def check_templates(folder: pathlib.Path) -> None:
    """The rows of `templates.json`, which are next to the arrays."""
    template = ChatTemplate(DEEPSEEK, {"eos_token": "<｜end▁of▁sentence｜>"})
    for row in json.loads((folder / "templates.json").read_text()):
        turns = [{**message, "role": message["role"].lower()} for message in row["conversation"]]
        *said, last = [{"role": "system", "content": row["system_prompt"]}, *turns]
        assert last == {"role": "assistant", "content": ""}, "every row of these ends where the model begins"
        assert template.render(said) == row["prompt"]


def projected(folder: pathlib.Path, case: str, settings: dict, inputs: dict[str, np.ndarray]) -> jax.Array:
    """The tokens of one projector; two sets of features go in as a tuple."""
    connector, rules = mlp_projector(settings, case, source=f"{case}.aligner")
    names = [f"{case}_x"] if f"{case}_x" in inputs else [f"{case}_high", f"{case}_low"]
    found = [jnp.asarray(inputs[name]) for name in names]
    features = [VisualFeatures(x, jnp.ones(x.shape[:2], bool), (1, x.shape[1])) for x in found]
    given = features[0] if len(features) == 1 else tuple(features)
    init = functools.partial(connector.init, deterministic=True)
    shapes = jax.eval_shape(init, jax.random.key(0), given)["params"]
    tensors = {key: x for key, x in open_checkpoint(folder).items() if key.startswith(f"{case}.")}
    params = import_params(rules, tensors, shapes)
    return connector.apply({"params": params}, given, deterministic=True).tokens


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`rel*_out` and `win_out`, whose sizes are those of the arrays asked for, and the projectors of the config."""
    entries = json.loads((folder / "golden.json").read_text())["arrays"]
    cases = json.loads((folder / "config.json").read_text())
    found = {f"{case}_y": projected(folder, case, settings, inputs) for case, settings in cases.items()}
    for name, entry in entries.items():
        stem = name.removesuffix("_out")
        if name == stem or entry["role"] != "output":
            continue
        if stem.startswith("rel"):
            queries, keys, _ = entry["shape"]
            found[name] = relative_positions(jnp.asarray(inputs[f"{stem}_in"]), queries, keys)
        elif stem.startswith("win"):
            found[name] = partition_windows(jnp.asarray(inputs[f"{stem}_in"]), entry["shape"][1])
        elif stem.startswith("pre"):
            found[name] = prepared(inputs[f"{stem}_u8"], entry["meaning"])
    check_templates(folder)
    return {name: np.asarray(value) for name, value in found.items()}

"""Single functions of DeepSeek-VL2: its projectors, of every kind, and the loss."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from vlm_jax.checkpoints.rules import import_params
from vlm_jax.losses.cross_entropy import cross_entropy
from vlm_jax.pretrained.projector import mlp_projector
from vlm_jax.processors.seen import Pixels
from vlm_jax.processors.tiles import DeepSeekVL2Views
from vlm_jax.processors.tiling import best_resolution
from vlm_jax.types import VisualFeatures

LANGUAGE = "the language model (router, rotary positions), which the package does not have so far"
NOT_COMPARED = {
    r"(gate|rope)\..*|yarn_get_mscale": LANGUAGE,
    r"projector\.\d+\.param\..*": "parameters, which are listed as outputs and are what the projectors are given",
}
_IGNORED = -100


def _projected(settings: dict, x: np.ndarray, tensors: dict[str, np.ndarray]) -> np.ndarray | jax.Array:
    if settings["projector_type"] == "identity":
        return x
    connector, rules = mlp_projector(settings, "projectors", source="projector")
    features = VisualFeatures(jnp.asarray(x), jnp.ones(x.shape[:2], bool), (settings["grid"],) * 2)
    init = functools.partial(connector.init, deterministic=True)
    params = import_params(rules, tensors, jax.eval_shape(init, jax.random.key(0), features)["params"])
    return jax.jit(functools.partial(connector.apply, deterministic=True))({"params": params}, features).tokens


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`projector.<i>.y` under the settings of `meta.json`, and `loss.value`."""
    expected, found = comparison.read(folder).expected, {}
    for i, settings in enumerate(json.loads((folder / "meta.json").read_text())["projectors"]):
        stem = f"projector.{i}."
        given = f"{stem}param."
        tensors = {f"projector.{name.removeprefix(given)}": x for name, x in expected.items() if name.startswith(given)}
        found[f"{stem}y"] = _projected(settings, inputs[f"{stem}x"], tensors)
    targets = jnp.asarray(inputs["loss.labels"][:, 1:])
    kept = targets != _IGNORED
    logits = jnp.asarray(inputs["loss.logits"][:, :-1])
    found["loss.value"] = cross_entropy(logits, jnp.where(kept, targets, 0), kept.astype(jnp.float32))[0]
    found |= _resolutions(expected, comparison.read(folder).entries["resolution.table"]["meaning"])
    return {name: np.asarray(array) for name, array in found.items()}


def _resolutions(expected: dict[str, np.ndarray], meaning: str) -> dict[str, np.ndarray]:
    """The canvas of every size of the table; the released candidates are listed as an output."""
    candidates = expected["resolution.candidates"]
    side, tokens = map(int, re.search(r"tile (\d+).*-> (\d+)x", meaning).groups())
    views = DeepSeekVL2Views(Pixels(), side, tokens, tuple((height, width) for width, height in candidates.tolist()))
    rows = []
    for width, height, *_ in expected["resolution.table"].tolist():
        (layout,), grid = views.layouts([(height, width)]), views.grid((height, width), 1)
        best = best_resolution((height, width), views.canvases)
        rows.append([width, height, *best[::-1], *grid[::-1], len(layout)])
    return {"resolution.candidates": candidates, "resolution.table": np.array(rows)}

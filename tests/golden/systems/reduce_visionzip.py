"""VisionZip by its released rule, on features, attention and keys of a class token and patches."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from vlm_jax.reducers.reducer import real
from vlm_jax.reducers.visionzip import VisionZip, contextual
from vlm_jax.types import VisualFeatures

NOT_COMPARED = {
    "anyres_tokens": "the order of kept tokens over the raster of a whole picture of tiles: here tile follows tile",
}


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_dominant`, `_kept_sorted`, `_targets`, `_targets_at`, `_assigned`, `_contextual`, `_tokens`."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        if f"{case}_hidden" in inputs:
            found |= {f"{case}_{name}": array for name, array in of_case(settings, case, inputs).items()}
    return {name: np.asarray(array) for name, array in found.items() if name in expected}


def of_case(settings: dict, case: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    dominant, count = settings["dominant_num"] + 1, settings["contextual_num"]  # the class token is dominant
    hidden, attention = jnp.asarray(inputs[f"{case}_hidden"]), jnp.asarray(inputs[f"{case}_attn"])
    keys = jnp.swapaxes(jnp.asarray(inputs[f"{case}_keys"]), 1, 2)
    mask = jnp.ones(hidden.shape[:2], bool)
    features = VisualFeatures(
        hidden, mask, (1, hidden.shape[1]), saliency=attention.mean(axis=1), keys=keys, num_prefix=1
    )
    reducer = VisionZip(dominant + count, contextual_share=count / (dominant + count), rule="as_released")
    out = jax.jit(lambda features: reducer.apply({}, features, deterministic=True))(features)
    assert reducer.num_left(hidden.shape[1] - 1) == out.tokens.shape[1]
    kept, targets = np.split(np.asarray(out.kept), [dominant], axis=1)
    merged = contextual(real(hidden, mask), mask, keys, jnp.asarray(kept), count)
    saliency = np.asarray(features.saliency)
    falling = [row[1:][np.argsort(-image[row[1:]], kind="stable")] for row, image in zip(kept, saliency, strict=True)]
    joined, rest = np.asarray(merged.joins).any(-1), [np.setdiff1d(np.arange(hidden.shape[1]), row) for row in kept]
    return {
        "dominant": np.concatenate([kept[:, :1], falling], axis=1),
        "kept_sorted": kept,
        "targets": np.searchsorted(rest[0], targets[0]),
        "targets_at": targets,
        "assigned": np.stack([np.argmax(j[some], -1) for j, some in zip(merged.joins, joined, strict=True)]),
        "contextual": out.tokens[:, dominant:],
        "tokens": out.tokens,
    }

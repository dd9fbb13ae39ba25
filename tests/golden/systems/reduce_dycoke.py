"""DyCoke's merging over time by its released rule, on frames of tokens."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from vlm_jax.reducers.clips import ReducesClips
from vlm_jax.reducers.dycoke import DyCoke
from vlm_jax.types import VisualFeatures

NOT_COMPARED = {
    "runs_ok": "videos of 4 frames or fewer, with which the release fails, are compared in pairs",
    "cache_(keep.*|similarity)": "only the first stage is there: no cached tokens are chosen while decoding",
}


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_kept`, `_tokens`."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        if f"{case}_frames" not in inputs or inputs[f"{case}_frames"].ndim != 3:
            continue
        frames = inputs[f"{case}_frames"]
        reducer = DyCoke(1, frames=len(frames), merging_ratio=settings["dycoke_k"], rule="as_released")
        tokens, kept = reduced(reducer, given(frames))
        found |= {f"{case}_kept": kept, f"{case}_tokens": tokens}
    return {name: array for name, array in found.items() if name in expected}


def given(frames: np.ndarray, attention: np.ndarray | None = None) -> VisualFeatures:
    """The frames [T, N, D] of a clip, with the attention [T, N] to them."""
    saliency = jnp.zeros(frames.shape[:2]) if attention is None else jnp.asarray(attention)
    keys = jnp.zeros((*frames.shape[:2], 1, 1))
    mask = jnp.ones(frames.shape[:2], bool)
    return VisualFeatures(jnp.asarray(frames), mask, (1, frames.shape[1]), saliency=saliency, keys=keys)


def reduced(reducer: ReducesClips, features: VisualFeatures) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the clip that are left, and their indices in it."""
    out = jax.jit(lambda features: reducer.apply({}, features, deterministic=True))(features)
    size, mask = features.mask.shape[1], np.asarray(out.mask).reshape(-1)
    own = np.asarray(out.kept) + np.arange(len(out.kept))[:, None] * size
    return np.asarray(out.tokens).reshape(len(mask), -1)[mask], own.reshape(-1)[mask]

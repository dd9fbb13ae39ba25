"""HoliTom's merging by its released rule, on pooled frames of tokens and the attention to them."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from tests.golden.systems.reduce_dycoke import given, reduced
from vlm_jax.reducers.clips import as_clip, similarity_before
from vlm_jax.reducers.holitom import HoliTom


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_similarity`, `_segments`, `_static`, `_tokens`."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        frames, attention = inputs[f"{case}_frames"], inputs[f"{case}_attn"]
        reducer = HoliTom(
            1,
            frames=len(frames),
            threshold=settings["tau"],
            ratio=settings["retain_ratio"],
            center_weight=settings["Beta"],
            num_neighbors=settings["K"],
            rule="as_released",
        )
        tokens, kept = reduced(reducer, given(frames, attention))
        if settings["mm_newline_position"] == "grid":
            tokens = with_newlines(tokens, kept, frames.shape[1], inputs[f"{case}_newline"])
        similarity, first, static = jax.jit(lambda frames, reducer=reducer: parts(reducer, frames))(frames)
        arrays = {
            "similarity": similarity,
            "segments": windows(np.asarray(first)[: len(frames)]),
            "static": np.asarray(static)[np.asarray(first) == np.arange(len(first))][: len(windows(
                np.asarray(first)[: len(frames)]))],
            "tokens": tokens,
        }  # fmt: skip
        found |= {f"{case}_{name}": np.asarray(array) for name, array in arrays.items()}
    return {name: array for name, array in found.items() if name in expected}


def parts(reducer: HoliTom, frames: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cosines to the frame before, the first frame of every frame's window, and its number of static tokens."""
    count, per_frame = frames.shape[:2]
    tokens = jnp.asarray(frames).reshape(count * per_frame, -1)
    size = len(tokens)
    mask, saliency = jnp.ones(size, bool), jnp.zeros(size)
    clip = as_clip(tokens, mask, saliency, jnp.asarray(count), jnp.asarray(size))
    similarity = similarity_before(clip, jnp.ones(size, jnp.int32)).reshape(count, per_frame)[1:]
    merged = reducer.merged(clip)
    static = jax.ops.segment_sum((merged.member & merged.static).astype(jnp.int32), clip.frame, count)
    return similarity, merged.first[::per_frame], static


def windows(first: np.ndarray) -> np.ndarray:
    """The first and the last frame of each window, from the first of each frame's."""
    starts = np.unique(first)
    return np.stack([starts, np.append(starts[1:], len(first)) - 1], axis=1).astype(np.int32)


def with_newlines(tokens: np.ndarray, kept: np.ndarray, per_frame: int, newline: np.ndarray) -> np.ndarray:
    """The tokens in the order of their places, with a newline behind those of every row of a frame."""
    side, order = int(per_frame**0.5), np.argsort(kept)
    rows = itertools.groupby(order, key=lambda number: kept[number] // side)
    return np.concatenate([part for _, row in rows for part in (tokens[list(row)], newline[None])])

"""PruneVid's merging by its released rule: clusters of tokens, segments of frames, and whole videos."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from tests.golden.systems.reduce_dycoke import given, reduced
from vlm_jax.layers.density_peaks import distances, nearest_centers, peak_scores, ranks
from vlm_jax.reducers.clips import as_clip, merge_static
from vlm_jax.reducers.prunevid import PruneVid, refined, static_similarity


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_clusters`; `_refined` and `_lengths`; `_frame_clusters`, `_windows`, `_static`, `_dynamic`, `_tokens`."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        if f"{case}_x" in inputs:
            found[f"{case}_clusters"] = clusters(inputs[f"{case}_x"], settings["cluster_num"], settings["k"])
        elif f"{case}_frames" in inputs:
            arrays = of_video(inputs[f"{case}_frames"], settings)
            found |= {f"{case}_{name}": array for name, array in arrays.items()}
        else:
            labels = jnp.asarray(inputs[f"{case}_clusters"])
            every = jax.jit(jax.vmap(refined))(labels, jnp.ones(labels.shape, bool))
            found[f"{case}_refined"] = np.asarray(every)
            found[f"{case}_lengths"] = np.stack([lengths(np.flatnonzero(np.diff(row, prepend=-1)), len(row))
                                                 for row in np.asarray(every)])  # fmt: skip
    return {name: array for name, array in found.items() if name in expected}


def clusters(x: np.ndarray, number: int, neighbors: int) -> np.ndarray:
    """The cluster of every vector [B, N]."""

    def of_one(x: jax.Array) -> jax.Array:
        distance, pairs = distances(x), jnp.ones((len(x), len(x)), bool)
        rank = ranks(peak_scores(distance, pairs, neighbors), pairs)
        return rank[nearest_centers(distance, pairs, rank < number, rank)]

    return np.asarray(jax.jit(jax.vmap(of_one))(jnp.asarray(x)))


def of_video(frames: np.ndarray, settings: dict) -> dict[str, np.ndarray]:
    """The outputs of a video [T, N, D]."""
    count, per_frame = frames.shape[:2]
    ratio = settings["temporal_segment_ratio"]
    reducer = PruneVid(
        1,
        frames=count,
        threshold=settings["tau"],
        segment_ratio=ratio,
        cluster_ratio=settings["cluster_ratio"],
        num_neighbors=settings["k"],
        rule="as_released",
    )
    tokens, kept = reduced(reducer, given(frames))
    first, length, static = (np.asarray(x) for x in jax.jit(lambda frames: parts(reducer, frames))(frames))
    starts = [number for number in range(count) if first[number] == number]
    frame, is_static = kept // per_frame, static[kept]
    number = {name: [int(((first[frame] == start) & (is_static == which)).sum()) for start in starts]
              for name, which in (("static", True), ("dynamic", False))}  # fmt: skip
    return {
        "frame_clusters": clusters(frames.mean(axis=1)[None], int(count * ratio), settings["k"]),
        "windows": length[starts],
        "static": np.asarray(number["static"], np.int32),
        "dynamic": np.asarray(number["dynamic"], np.int32),
        "tokens": tokens[None],
    }


def parts(reducer: PruneVid, frames: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first frame and the length of every frame's segment, and whether each token is static."""
    count, per_frame = frames.shape[:2]
    tokens = jnp.asarray(frames).reshape(count * per_frame, -1)
    size = len(tokens)
    mask, saliency = jnp.ones(size, bool), jnp.zeros(size)
    clip = as_clip(tokens, mask, saliency, jnp.asarray(count), jnp.asarray(size))
    found = reducer.segments(clip)
    merged = merge_static(clip, found, static_similarity(clip, found) > reducer.threshold)
    return found.first, found.length, merged.static


def lengths(starts: np.ndarray, count: int) -> np.ndarray:
    """The lengths of runs that begin at the given indices."""
    return np.diff(np.append(starts, count)).astype(np.int32)

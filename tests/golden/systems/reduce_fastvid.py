"""FastVID by its released rules for LLaVA-OneVision and for Qwen2.5-VL, on the sequence of a prompt with a video."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import comparison
from vlm_jax.reducers.clips import as_clip, neighbour_similarity
from vlm_jax.reducers.fastvid import FastVID


def outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`<case>_segments`, `_keep`, `_embeds_out`."""
    expected, found = comparison.read(folder).expected, {}
    for case, settings in json.loads((folder / "settings.json").read_text()).items():
        embeds, attention = inputs[f"{case}_embeds"][0], inputs[f"{case}_attn"]
        start, size = settings["video_start"], attention.size
        reducer = FastVID(
            1,
            frames=len(attention),
            num_segments=settings["DySeg_c"],
            threshold=settings["DySeg_tau"],
            context_share=settings["STPrune_d"],
            anchor_step=settings["DTM_p"],
            least_weight=settings["DTM_beta"],
            ratio=settings["retention_ratio"],
            still=settings.get("DySeg_ignore"),
            rule="as_released",
        )
        run = jax.jit(lambda *arrays, reducer=reducer: of_video(reducer, *arrays))
        (tokens, kept, mask), length = run(embeds[start : start + size], attention, inputs[f"{case}_global"])
        tokens, kept = np.asarray(tokens)[np.asarray(mask)], np.asarray(kept)[np.asarray(mask)]
        behind = np.arange(start + size, len(embeds))
        keep = np.concatenate([np.arange(start), start + kept, behind])
        embeds_out = np.concatenate([embeds[:start], tokens, embeds[behind]])[None]
        arrays = {"segments": segment_lengths(np.asarray(length)[: len(attention)]), "keep": keep,
                  "embeds_out": embeds_out}  # fmt: skip
        found |= {f"{case}_{name}": array for name, array in arrays.items()}
    return {name: array for name, array in found.items() if name in expected}


def of_video(reducer: FastVID, tokens: jax.Array, attention: jax.Array, frames: jax.Array):
    """What is left of a video's tokens [L, D], and the length of every frame's segment."""
    size, count = len(tokens), len(attention)
    mask = jnp.ones(size, bool)
    clip = as_clip(jnp.asarray(tokens), mask, attention.reshape(-1), jnp.asarray(count), jnp.asarray(size))
    frames = jnp.pad(frames, ((0, size - count), (0, 0)))
    found = reducer.segments(neighbour_similarity(frames, clip.frames), clip.frames)
    return reducer.left_of_clip(clip, size, frames), found.length


def segment_lengths(lengths: np.ndarray) -> np.ndarray:
    """The length of each segment, from that of each frame's."""
    found, frame = [], 0
    while frame < len(lengths):
        found.append(lengths[frame])
        frame += lengths[frame]
    return np.asarray(found, np.int32)

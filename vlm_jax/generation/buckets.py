"""Padding of prompts: lengths to a few buckets, rows to a multiple of the devices."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from vlm_jax.generation.sampling import GenerationError
from vlm_jax.sharding.rules import BATCH_AXES
from vlm_jax.types import PADDING_SEGMENT, PROMPT_SEGMENT, TEXT_SLOT, Batch, Fields, Interpolation, VisualPlaces

SHORTEST_BUCKET = 16
CACHE_MULTIPLE = 32  # cache lengths are multiples of it, so that a few more new tokens need no compilation

# Padding values of the columns before a prompt.
FILL: Fields = {
    "tokens": 0,
    "positions": 0,
    "segment_ids": PADDING_SEGMENT,
    "visual_index": TEXT_SLOT,
}


def bucket(length: int, buckets: Sequence[int] | None = None, name: str = "the prompt") -> int:
    """The length to which a prompt of `length` positions is padded.

    Args:
      length: of the longest prompt of a batch.
      buckets: available lengths; when None powers of two from 16 on, and the numbers half way between.
      name: name of the prompt in errors.

    Raises:
      GenerationError: no bucket is long enough.
    """
    if buckets is None:
        power = max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())
        return power * 3 // 4 if power > SHORTEST_BUCKET and length <= power * 3 // 4 else power
    longer = [size for size in buckets if size >= length]
    if not longer:
        raise GenerationError(
            f"{name}: a prompt padded to {length} positions is longer than every bucket of {list(buckets)}; add one of "
            f"{length} or more to buckets, or shorten the prompt"
        )
    return min(longer)


def fitted(
    batch: Batch,
    max_new_tokens: int,
    cache_length: int | None,
    buckets: Sequence[int] | None,
    names: Sequence[str],
) -> tuple[Batch, int]:
    """The batch, padded on the left to a bucket and without training-only fields, and the length of its cache.

    Raises:
      GenerationError: a prompt that is empty, has several segments or branches, or is too long for the cache or
        the buckets; the message names it.
    """
    segments = np.asarray(batch.segment_ids)
    sizes = np.count_nonzero(segments != PADDING_SEGMENT, axis=1)
    _check(batch, segments, sizes, names)
    length, following = segments.shape[1], max_new_tokens - 1  # the last token is not fed back
    row = int(np.argmax(sizes))
    if cache_length is not None and length + following > cache_length:
        raise GenerationError(
            f"{names[row]}: a prompt of {sizes[row]} tokens, in a batch padded to {length}, and {max_new_tokens} new "
            f"tokens need {length + following} slots, but the cache has {cache_length}; raise cache_length, "
            "shorten the prompt, or reduce max_new_tokens"
        )
    wanted = bucket(length, buckets, names[row])
    if cache_length is None:
        cache_length = -(-(wanted + following) // CACHE_MULTIPLE) * CACHE_MULTIPLE
    padding = min(wanted, cache_length - following) - length

    def padded(name: str) -> np.ndarray:
        array = getattr(batch, name)
        if not padding:
            return array
        array = np.asarray(array)
        return np.pad(array, ((0, 0), (padding, 0), *[(0, 0)] * (array.ndim - 2)), constant_values=FILL.get(name, 0))

    needed: Fields = {name: padded(name) for name in _columns(batch)}
    needed["interpolation"] = _padded(batch.interpolation, padding, 0)
    places = None if batch.places is None else _shifted(batch.places, padding, length + padding)
    return dataclasses.replace(batch, **needed, places=places, targets=None, loss_weights=None), cache_length


def lengthened(batch: Batch, length: int) -> Batch:
    """The batch, with targets, padded on the right to `length` positions."""
    padding = length - batch.tokens.shape[1]
    if not padding:
        return batch

    def padded(name: str) -> np.ndarray:
        array = np.asarray(getattr(batch, name))
        return np.pad(array, ((0, 0), (0, padding), *[(0, 0)] * (array.ndim - 2)), constant_values=FILL.get(name, 0))

    names = [*_columns(batch), "targets", "loss_weights", *(["branch_ids"] if batch.branch_ids is not None else [])]
    places = batch.places
    if places is not None:
        index = np.asarray(places.index)
        index = np.where(index == batch.tokens.shape[1], np.int32(length), index)
        ranking = np.pad(np.asarray(places.ranking), ((0, 0), (0, padding)))
        lengths = tuple(min(bucket(kept, None, ""), length) for kept in places.lengths)
        places = VisualPlaces(index, ranking, lengths)
    needed: Fields = {name: padded(name) for name in names}
    needed["interpolation"] = _padded(batch.interpolation, 0, padding)
    return dataclasses.replace(batch, **needed, places=places)


def _padded(given: Interpolation | None, before: int, after: int) -> Interpolation | None:
    """The rows of visual tokens, with none for added positions."""
    return jax.tree.map(lambda leaf: np.pad(np.asarray(leaf), ((0, 0), (before, after), (0, 0))), given)


def _columns(batch: Batch) -> list[str]:
    """The arrays of a prompt with a column for each position."""
    return [*FILL, *(["group_ids"] if batch.group_ids is not None else [])]


def _shifted(places: VisualPlaces, padding: int, length: int) -> VisualPlaces:
    """Shifts places by left padding; row lengths are padded to buckets too, so that few programs are compiled."""
    ranking = np.pad(np.asarray(places.ranking), ((0, 0), (padding, 0)))
    lengths = tuple(min(bucket(kept, None, ""), length) for kept in places.lengths)
    return VisualPlaces(np.asarray(places.index) + np.int32(padding), ranking, lengths)


def _check(batch: Batch, segments: np.ndarray, sizes: np.ndarray, names: Sequence[str]) -> None:
    """Raises a GenerationError for a row that is not a single prompt."""
    for row in np.flatnonzero(sizes == 0).tolist():
        raise GenerationError(
            f"{names[row]}: the prompt is empty; expected at least one token with segment id {PROMPT_SEGMENT}"
        )
    foreign = (segments != PADDING_SEGMENT) & (segments != PROMPT_SEGMENT)
    for row in np.flatnonzero(foreign.any(axis=1)).tolist():
        raise GenerationError(
            f"{names[row]}: expected segment ids {PADDING_SEGMENT} (padding) and {PROMPT_SEGMENT} (the prompt), got "
            f"{np.unique(segments[row]).tolist()}; put each prompt in a separate row, with segment id {PROMPT_SEGMENT}"
        )
    if batch.branch_ids is not None:
        row = int(np.argmax(np.asarray(batch.branch_ids).any(axis=1)))
        raise GenerationError(
            f"{names[row]}: the batch has branch_ids, but a prompt is one branch; put each branch in a separate row, "
            "with branch_ids=None"
        )


def whole_rows(batch: Batch, mesh: Mesh | None) -> tuple[Batch, int]:
    """The batch with its last row repeated until the mesh's data axes divide it, and the number of repeats."""
    if mesh is None:
        return batch, 0
    extra = -len(batch.tokens) % int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if not extra:
        return batch, 0
    return jax.tree.map(lambda leaf: np.concatenate([leaf, *[leaf[-1:]] * extra]), batch), extra

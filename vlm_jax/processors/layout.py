"""Converts the pieces of a row to the arrays of a batch.

The order of text and images is data, not part of the model: each position has a vocabulary id or
a row of the visual table, which this file writes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from vlm_jax.types import PADDING_SEGMENT, TEXT_SLOT, Batch, Interpolation


class SequenceTooLong(ValueError):
    """A sample that does not fit; the message names it, its length, the limit and the config key."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A run of text.

    Attributes:
      ids: vocabulary ids.
      learned: loss weight of predicting it; 0 where it is not learned.
      branch: 0 for text that everything after it attends to; a separate number for a turn that attends
        only to branch 0 and itself.
      group: positions of consecutive pieces of one group other than 0 attend to each other in both directions; see
        `types.Batch.group_ids`.
    """

    ids: Sequence[int]
    learned: float | bool = 0.0
    branch: int = 0
    group: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Visual:
    """A run of visual tokens; always of branch 0.

    Attributes:
      rows: indices in the row's visual table.
      ids: placeholder token ids.
      positions: of every token, from 0, on one axis or as (time, row, column); None for consecutive ones as for text.
      before: where a reducer keeps positions of tokens, the positions of all tokens before it, from 0.
      extent: offset of the positions after the run; max(positions) + 1 when None.
      interpolation: the rows of which each token is a weighted mean; None where each is that of `rows`.
      group: as of `Text`.
    """

    rows: Sequence[int] | Int[np.ndarray, "n"]
    ids: Sequence[int] | Int[np.ndarray, "n"]
    positions: Int[np.ndarray, "n"] | Int[np.ndarray, "n 3"] | None = None
    before: Int[np.ndarray, "m"] | Int[np.ndarray, "m 3"] | None = None
    extent: int | None = None
    interpolation: Interpolation | None = None
    group: int = 0

    def __len__(self) -> int:
        return len(self.rows)


Pieces = Sequence[Text | Visual]


def lay_out(
    examples: Sequence[Pieces],
    length: int,
    *,
    pad_id: int,
    pad_side: Literal["right", "left"] = "right",
    rotary_3d: bool = False,
    interpolates: bool = False,
) -> Batch:
    """Writes examples one after another into one row, padded to `length`, as a batch of one.

    Args:
      examples: pieces of each in reading order; each example is a segment, counted from 1.
      length: positions of the row, T; at least the total length of the pieces.
      pad_id: id of padding, and target where there is nothing to predict.
      pad_side: "right" for training; "left" for prompts, so that all end at the last position.
      rotary_3d: positions have three axes.
      interpolates: whether the batch has an `interpolation`, with or without tokens that need one.

    Returns:
      A Batch with B = 1 and without images; all fields are numpy arrays [1, length], int32, and
      float32 for loss_weights. `targets` has at each position the next id of its example; loss_weights
      is the weight of the piece of that id. Positions count from 0 in every example, and
      continue from the end of branch 0 in every branch; on three axes, positions after an image continue from its
      maximum. `branch_ids` is None where all is branch 0, `group_ids` where no piece has a group, and
      `visual_positions` where no image has `before`.

    Raises:
      ValueError: the pieces are longer than `length`.
    """
    segments = [_Segment(pieces, rotary_3d) for pieces in examples or [()]]
    count = sum(len(segment.ids) for segment in segments)
    if count > length:
        raise ValueError(f"{count} positions do not fit in a row of {length}")
    start = 0 if pad_side == "right" else length - count
    written = functools.partial(_written, length, start)
    branches = [segment.branches for segment in segments]
    groups = [segment.groups for segment in segments]
    return Batch(
        tokens=written([segment.ids for segment in segments], pad_id),
        positions=written([segment.positions for segment in segments], 0),
        segment_ids=written(
            [np.full(len(segment.ids), number) for number, segment in enumerate(segments, PADDING_SEGMENT + 1)],
            PADDING_SEGMENT,
        ),
        visual_index=written([segment.rows for segment in segments], TEXT_SLOT),
        branch_ids=written(branches, 0) if any(part.any() for part in branches) else None,
        group_ids=written(groups, 0) if any(part.any() for part in groups) else None,
        targets=written([_next(segment.ids, pad_id) for segment in segments], pad_id),
        loss_weights=written([_next(segment.learned, 0) for segment in segments], 0, np.float32),
        visual_positions=np.concatenate(before)[None] if (before := [x for s in segments for x in s.before]) else None,
        interpolation=_interpolation(examples, written) if interpolates else None,
    )


def _interpolation(examples: Sequence[Pieces], written: Callable[..., np.ndarray]) -> Interpolation:
    """The rows of every position; for a token that is a row itself, this row alone."""
    index, weights = [np.zeros((0, 4), np.int32)], [np.zeros((0, 4), np.float32)]
    for piece in (piece for pieces in examples for piece in pieces):
        own = piece.interpolation if isinstance(piece, Visual) else None
        if own is None:
            rows = piece.rows if isinstance(piece, Visual) else np.zeros(len(piece), np.int32)
            own = rows_alone(np.asarray(rows), float(isinstance(piece, Visual)))
        index.append(np.asarray(own.index))
        weights.append(np.asarray(own.weights))
    return Interpolation(written(index, 0), written(weights, 0, np.float32))


def rows_alone(rows: Int[np.ndarray, "n"], weight: float = 1.0) -> Interpolation:
    """The interpolation of tokens that are rows themselves."""
    first = np.array([1, 0, 0, 0])
    return Interpolation(rows[:, None] * first, np.tile(np.float32(weight) * first.astype(np.float32), (len(rows), 1)))


def _written(length: int, start: int, parts: Sequence[np.ndarray], fill: int, dtype: type = np.int32) -> np.ndarray:
    """A row [1, length] with the parts one after another from `start` on."""
    values = np.concatenate(parts)
    row = np.full((1, length, *values.shape[1:]), fill, dtype)
    row[0, start : start + len(values)] = values
    return row


class _Segment:
    """The arrays of one example."""

    def __init__(self, pieces: Pieces, rotary_3d: bool):
        dtypes = (np.int32, np.int32, np.float32, np.int32, np.int32)
        parts: list[tuple[np.ndarray, ...]] = [tuple(np.zeros(0, dtype) for dtype in dtypes)]
        for piece in pieces:
            if isinstance(piece, Text):
                values = (piece.ids, TEXT_SLOT, piece.learned, piece.branch, piece.group)
            else:
                values = (piece.ids, piece.rows, 0, 0, piece.group)
            parts.append(
                tuple(
                    np.broadcast_to(np.asarray(v, dtype), len(piece)) for v, dtype in zip(values, dtypes, strict=True)
                )
            )
        self.ids, self.rows, self.learned, self.branches, self.groups = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        self.positions, self.before = _positions(pieces, rotary_3d)


def _next(values: np.ndarray, last: int) -> np.ndarray:
    """Values shifted left by one; `last` at the end."""
    return np.append(values[1:], np.asarray([last] * bool(len(values)), values.dtype))


def _positions(pieces: Pieces, rotary_3d: bool) -> tuple[np.ndarray, list[np.ndarray]]:
    """Positions of every token, and those of each image's tokens before a reducer.

    Source: Wang et al. 2024 (Qwen2-VL), section 2.1: each modality begins after the largest position before it.
    """
    found, before = [np.zeros((0, 3) if rotary_3d else 0, np.int32)], []
    following = {0: 0}
    shared = [piece for piece in pieces if isinstance(piece, Visual) or piece.branch == 0]
    end = sum(_extent(piece, rotary_3d) for piece in shared)  # where every other branch starts
    for piece in pieces:
        branch = 0 if isinstance(piece, Visual) else piece.branch
        start = following.setdefault(branch, end)
        own = piece.positions if isinstance(piece, Visual) else None
        if own is None or own.ndim > 1 + rotary_3d:  # without three axes positions of a grid are consecutive
            own = np.arange(len(piece))
        found.append((_on_axes(own, rotary_3d) + start).astype(np.int32))
        if isinstance(piece, Visual) and piece.before is not None:
            before.append((_on_axes(piece.before, rotary_3d) + start).astype(np.int32))
        following[branch] = start + _extent(piece, rotary_3d)
    return np.concatenate(found), before


def _on_axes(positions: np.ndarray, rotary_3d: bool) -> np.ndarray:
    return np.repeat(positions[:, None], 3, axis=1) if rotary_3d and positions.ndim == 1 else positions


def _extent(piece: Text | Visual, rotary_3d: bool) -> int:
    """Offset of the positions after the piece."""
    if isinstance(piece, Text):
        return len(piece)
    if piece.extent is not None:
        return piece.extent
    if piece.positions is None or piece.positions.ndim > 1 + rotary_3d:
        return len(piece)
    return int(np.max(piece.positions, initial=-1)) + 1

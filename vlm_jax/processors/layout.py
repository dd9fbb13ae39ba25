"""Layout is data: a sequence's pieces become the arrays that say what stands at every position.

The model knows no order of text and images. It reads, for each position, a vocabulary id or the
row of the visual table that fills it, and this file writes both.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from vlm_jax.types import PADDING_SEGMENT, TEXT_SLOT, Batch


class SequenceTooLong(ValueError):
    """A sample that does not fit; the message names it, its length, the limit and the config key."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A run of text.

    Attributes:
      ids: vocabulary ids.
      learned: whether the model is trained to say it.
      branch: 0 for what everything after it reads; a number of its own for a turn that reads
        branch 0 and itself alone.
    """

    ids: Sequence[int]
    learned: bool = False
    branch: int = 0


@dataclasses.dataclass(frozen=True)
class Visual:
    """A run of places that rows of the visual table fill.

    Attributes:
      rows: of the sample's table.
      ids: what stands there as a token; the image id everywhere when None.
      positions: (time, row, column) of every place, from 0; None where it has one as text has.
    """

    rows: Sequence[int] | Int[np.ndarray, "n"]
    ids: Sequence[int] | Int[np.ndarray, "n"] | None = None
    positions: Int[np.ndarray, "n 3"] | None = None


def lay_out(
    pieces: Sequence[Text | Visual],
    length: int,
    *,
    pad_id: int,
    image_id: int,
    sample_id: str,
    pad_side: Literal["right", "left"] = "right",
    rotary_3d: bool = False,
    limit_key: str = "config.processor.max_text_length",
) -> Batch:
    """Writes one sequence, padded to `length`, as a batch of one example.

    Args:
      pieces: in reading order.
      length: positions of the row, T.
      pad_id: id of padding, and target where there is nothing to predict.
      image_id: id that holds the place of a visual token.
      sample_id: names the sample in messages.
      pad_side: "right" for training; "left" for prompts, so that all end at the last position.
      rotary_3d: positions have three axes; without branches.
      limit_key: the config key that `length` is from, or grows with, for messages.

    Returns:
      A Batch with B = 1 and without images; all fields are numpy arrays [1, length], int32, and
      float32 for loss_weights. `targets` holds at each position the id of the next; loss_weights is
      1.0 where that next id belongs to a learned piece. Positions count from 0 at the first id, and
      on from the end of branch 0 in every branch; on three axes, what follows a picture counts on from its largest.
      `branch_ids` is None where all is branch 0.

    Raises:
      SequenceTooLong: the pieces are longer than `length`; nothing is ever truncated.
    """
    ids, rows, learned, branches = _joined(pieces, image_id)
    count = len(ids)
    if count > length:
        raise SequenceTooLong(
            f"sample '{sample_id}' is {count} tokens long, over the limit of {length}; raise "
            f"{limit_key} by {count - length} or more, or leave the sample out (nothing is truncated)"
        )
    start = 0 if pad_side == "right" else length - count
    end = start + count

    tokens = np.full((1, length), pad_id, np.int32)
    positions = np.zeros((1, length, 3) if rotary_3d else (1, length), np.int32)
    segment_ids = np.full((1, length), PADDING_SEGMENT, np.int32)
    visual_index = np.full((1, length), TEXT_SLOT, np.int32)
    targets = np.full((1, length), pad_id, np.int32)
    loss_weights = np.zeros((1, length), np.float32)
    tokens[0, start:end] = ids
    branch_ids = None
    if branches.any():
        branch_ids = np.zeros((1, length), np.int32)
        branch_ids[0, start:end] = branches
    positions[0, start:end] = _positions_3d(pieces) if rotary_3d else _positions(branches)
    segment_ids[0, start:end] = PADDING_SEGMENT + 1
    visual_index[0, start:end] = rows
    targets[0, start : max(end - 1, start)] = ids[1:]
    loss_weights[0, start : max(end - 1, start)] = learned[1:]
    return Batch(
        tokens=tokens,
        positions=positions,
        segment_ids=segment_ids,
        visual_index=visual_index,
        branch_ids=branch_ids,
        targets=targets,
        loss_weights=loss_weights,
    )


def _joined(pieces: Sequence[Text | Visual], image_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids, visual rows, whether a place is learned, and branches."""
    parts: list[tuple[np.ndarray, ...]] = [(np.zeros(0, np.int32),) * 4]
    for piece in pieces:
        if isinstance(piece, Text):
            count, ids, rows = len(piece.ids), np.asarray(piece.ids, np.int32), TEXT_SLOT
            learned, branch = piece.learned, piece.branch
        else:
            count, rows, learned, branch = len(piece.rows), np.asarray(piece.rows, np.int32), False, 0
            ids = image_id if piece.ids is None else np.asarray(piece.ids, np.int32)
        parts.append(tuple(np.broadcast_to(np.int32(part), count) for part in (ids, rows, learned, branch)))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]


def _positions(branches: np.ndarray) -> np.ndarray:
    within = np.zeros(len(branches), np.int32)
    for value in np.unique(branches):
        members = branches == value
        within[members] = np.arange(members.sum()) + (0 if value == 0 else (branches == 0).sum())
    return within


def _positions_3d(pieces: Sequence[Text | Visual]) -> np.ndarray:
    """Source: Wang et al. 2024 (Qwen2-VL), section 2.1: each modality begins after the largest position before it."""
    found: list[np.ndarray] = [np.zeros((0, 3), np.int32)]
    following = 0
    for piece in pieces:
        if isinstance(piece, Visual) and piece.positions is not None:
            own = piece.positions
        else:
            count = len(piece.ids if isinstance(piece, Text) else piece.rows)
            own = np.repeat(np.arange(count)[:, None], 3, axis=1)
        if len(own):
            found.append(own + following)
            following += int(own.max()) + 1
    return np.concatenate(found)

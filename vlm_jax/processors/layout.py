"""Layout is data: a sequence's pieces become the arrays that say what stands at every position.

The model knows no order of text and images. It reads, for each position, a vocabulary id or the
row of the visual table that fills it, and this file writes both.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

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
    """A run of visual tokens: rows start_row, start_row + 1, ... of the sample's visual table.

    Attributes:
      start_row: first row, from 0.
      count: number of rows.
    """

    start_row: int
    count: int


def lay_out(
    pieces: Sequence[Text | Visual],
    length: int,
    *,
    pad_id: int,
    image_id: int,
    sample_id: str,
    pad_side: Literal["right", "left"] = "right",
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
      limit_key: the config key that `length` is from, or grows with, for messages.

    Returns:
      A Batch with B = 1 and without images; all fields are numpy arrays [1, length], int32, and
      float32 for loss_weights. `targets` holds at each position the id of the next; loss_weights is
      1.0 where that next id belongs to a learned piece. Positions count from 0 at the first id, and
      on from the end of branch 0 in every branch. `branch_ids` is None where all is branch 0.

    Raises:
      SequenceTooLong: the pieces are longer than `length`; nothing is ever truncated.
    """
    ids: list[int] = []
    rows: list[int] = []
    learned: list[bool] = []
    branches: list[int] = []
    for piece in pieces:
        if isinstance(piece, Text):
            count = len(piece.ids)
            ids.extend(piece.ids)
            rows.extend([TEXT_SLOT] * count)
            learned.extend([piece.learned] * count)
            branches.extend([piece.branch] * count)
        else:
            branches.extend([0] * piece.count)
            ids.extend([image_id] * piece.count)
            rows.extend(range(piece.start_row, piece.start_row + piece.count))
            learned.extend([False] * piece.count)
    count = len(ids)
    if count > length:
        raise SequenceTooLong(
            f"sample '{sample_id}' is {count} tokens long, over the limit of {length}; raise "
            f"{limit_key} by {count - length} or more, or leave the sample out (nothing is truncated)"
        )
    start = 0 if pad_side == "right" else length - count
    end = start + count

    tokens = np.full((1, length), pad_id, np.int32)
    positions = np.zeros((1, length), np.int32)
    segment_ids = np.full((1, length), PADDING_SEGMENT, np.int32)
    visual_index = np.full((1, length), TEXT_SLOT, np.int32)
    targets = np.full((1, length), pad_id, np.int32)
    loss_weights = np.zeros((1, length), np.float32)
    tokens[0, start:end] = ids
    branch = np.asarray(branches, np.int32)
    within = np.zeros(count, np.int32)
    for value in np.unique(branch):
        members = branch == value
        within[members] = np.arange(members.sum()) + (0 if value == 0 else (branch == 0).sum())
    branch_ids = None
    if branch.any():
        branch_ids = np.zeros((1, length), np.int32)
        branch_ids[0, start:end] = branch
    positions[0, start:end] = within
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

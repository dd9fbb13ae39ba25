"""Changes of the row layout for a token reducer: the remaining tokens, and those that the decoder drops."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.question import QuestionTexts
from vlm_jax.processors.views import Layout, PreparedImage, Tiles, Views
from vlm_jax.types import PADDING_SEGMENT, Batch, PackedImages, RowShape, VisualPlaces


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of an image before a reducer.

    Attributes:
      groups: number of tokens of each tile, or of the whole image where it is packed.
      placed: number of tokens of each after a reducer before the decoder.
      positions: position of each in the sequence, from 0; on three axes where text has three.
      extent: offset of the positions after the image.
      frames: frames of a packed video, 1 for an image.
      question: segments of the question by which they are chosen, where the reducer chooses by it, else None.
    """

    groups: tuple[int, ...]
    placed: tuple[int, ...]
    positions: Int[np.ndarray, "n"] | Int[np.ndarray, "n 3"]
    extent: int
    frames: int = 1
    question: Int[np.ndarray, "S T"] | None = None


@dataclasses.dataclass(frozen=True)
class Reduction:
    """The host's description of a reducer.

    Attributes:
      before: the views of the system without it.
      num_left: number of tokens of a tile, or of a packed image -> number that enters the decoder; None where
        all enter it.
      drops: for each drop inside the decoder, number of tokens that entered it -> number after the drop.
      keeps_positions: whether kept tokens keep their positions; else they are renumbered.
      is_packed: whether images are packed in one sequence, so that the reducer needs their positions.
      compares_frames: whether it compares the frames of a video, which must then be packed.
      question: converts the question for a reducer that chooses by it, else None.
    """

    before: Views
    num_left: Callable[[int], int] | None
    drops: tuple[Callable[[int], int], ...] = ()
    keeps_positions: bool = False
    is_packed: bool = False
    compares_frames: bool = False
    question: QuestionTexts | None = None

    def left(self, count: int) -> int:
        """Number of tokens out of `count` that enter the decoder."""
        return count if self.num_left is None else self.num_left(count)

    def tokens(
        self, load: int, layout: Layout, full: Layout, prepared: PreparedImage | None, frames: int = 1
    ) -> Tokens:
        """The tokens of one place.

        Args:
          load: tiles of the image; unused for packed ones.
          layout: layout of the place after the reducer.
          full: layout of the same place without the reducer.
          prepared: for positions on three axes; else None.
          frames: frames of a packed video.
        """
        own = full[full >= 0]
        groups = self.before.groups(load) if isinstance(self.before, Tiles) else (len(own),)
        left = [self.left(count) for count in groups]
        shown = np.searchsorted(np.cumsum(left), layout[layout >= 0], side="right")
        placed = np.bincount(shown, minlength=len(groups))
        if prepared is not None and prepared.positions is not None:
            positions, extent = prepared.positions, int(prepared.positions.max(initial=-1)) + 1
        else:  # a token that the layout omits has the position of the previous one
            at = np.full(sum(groups), -1)
            at[own] = np.flatnonzero(full >= 0)
            positions, extent = np.maximum(np.maximum.accumulate(at), 0), len(full)
        return Tokens(groups, tuple(placed.tolist()), positions, extent, frames)

    def positions(self, tokens: Tokens, layout: Layout) -> np.ndarray:
        """Positions of an image whose tokens keep their positions: an upper bound for tokens, which the model replaces.

        Learned rows follow the tokens before them.
        """
        ends = np.cumsum([self.left(count) for count in tokens.groups])
        last = np.maximum.accumulate(tokens.positions.max(axis=-1) if tokens.positions.ndim > 1 else tokens.positions)
        behind = last[np.cumsum(tokens.groups) - 1] + 1  # the position after each group
        group = np.searchsorted(ends, np.maximum.accumulate(np.maximum(layout, -1)), side="right")
        found = np.where((layout < 0) & (np.maximum.accumulate(layout) < 0), 0, np.append(behind, 0)[group])
        return np.minimum(found, tokens.extent - 1)

    def kept(self, length: int, pictures: Sequence[Tokens]) -> tuple[int, ...]:
        """Length of an example of `length` positions after each drop."""
        counts = [count for tokens in pictures for count in tokens.placed]
        return tuple(length - sum(count - drop(count) for count in counts) for drop in self.drops)

    def num_before(self, capacity: int) -> int:
        """Maximum number of tokens before the reducer of images with a total load of `capacity`."""
        if isinstance(self.before, NativeViews):
            return capacity // self.before.format.merge_size**2 * self.before.block_tokens
        return capacity * max(self.before.groups(capacity), default=0) if isinstance(self.before, Tiles) else 0

    def applied(
        self, batch: Batch, rows: Sequence[Sequence[Tokens]], num_learned: int, shape: RowShape | None
    ) -> Batch:
        """The batch with the inputs of the reducer.

        Args:
          batch: rows with the layout after the reducer, and the images.
          rows: the images of each row, in order.
          num_learned: rows of the visual table before those of images.
          shape: shape of every row, which makes sizes static; the smallest that fits when None.
        """
        capacity = None if shape is None else shape.images
        groups = [[count for tokens in row for count in tokens.groups] for row in rows]
        native = isinstance(self.before, NativeViews)
        static = None if shape is None else (shape.pictures if native and shape.images else shape.images)
        num_images = max(map(len, groups)) if static is None else static
        if self.is_packed and batch.images is not None:
            longest = None if static is None else self.num_before(shape.images)  # type: ignore[union-attr]
            frames = [[tokens.frames for tokens in row] for row in rows]
            packed = _packed(groups, frames, num_images, longest)
            batch = dataclasses.replace(batch, images=dataclasses.replace(batch.images, images=packed))  # type: ignore
        if self.question is not None and batch.images is not None:
            asked = [[one.question for one in row for _ in one.groups if one.question is not None] for row in rows]
            question = self.question.batched(
                asked,
                batch.images.shape[1],  # type: ignore[union-attr]
                static=shape is not None,
            )
            batch = dataclasses.replace(batch, question=question)
        if self.drops and (num_images or batch.images is not None):  # rows of text may have room for images
            left = [[self.left(count) for count in of_row] for of_row in groups]
            places = visual_places(batch, left, max(num_images, 1), self._most_left(left, shape), num_learned)
            batch = dataclasses.replace(
                batch, places=dataclasses.replace(places, lengths=self._lengths(batch, rows, shape))
            )
        if capacity and self.keeps_positions:
            before = batch.positions[:, :0] if batch.visual_positions is None else batch.visual_positions
            width = [(0, 0), (0, self.num_before(capacity) - before.shape[1]), *[(0, 0)] * (before.ndim - 2)]
            batch = dataclasses.replace(batch, visual_positions=np.pad(before, width))
        return batch

    def _most_left(self, left: Sequence[Sequence[int]], shape: RowShape | None) -> int:
        """Maximum number of tokens of a tile or image that enter the decoder; for a static shape of any tile."""
        if shape is not None and isinstance(self.before, Tiles):
            return max(map(self.left, self.before.groups(max(shape.images, 1))))
        if shape is not None and shape.pictures is not None:
            return self.left(self.num_before(shape.images))
        return max(max(counts, default=1) for counts in left)

    def _lengths(self, batch: Batch, rows: Sequence[Sequence[Tokens]], shape: RowShape | None) -> tuple[int, ...]:
        """Length of rows after each drop: that of the shape, else the maximum over the rows."""
        if shape is not None:
            return shape.kept or (shape.length,) * len(self.drops)
        real = np.count_nonzero(np.asarray(batch.segment_ids) != PADDING_SEGMENT, axis=1).tolist()
        kept = [self.kept(count, row) for count, row in zip(real, rows, strict=True)]
        return tuple(max(of_drop) for of_drop in zip(*kept, strict=True))


def visual_places(
    batch: Batch, counts: Sequence[Sequence[int]], num_images: int, most: int, num_learned: int = 0
) -> VisualPlaces:
    """The positions of the tokens of each image of every row, and the last position of every instruction.

    Args:
      batch: rows with their layout.
      counts: for each row, the number of tokens of each image (or tile) in the order of its visual table.
      num_images: padded number of images of a row.
      most: padded number of tokens of an image.
      num_learned: rows of the visual table before those of images.
    """
    length = batch.tokens.shape[1]
    index = np.full((len(counts), num_images, most), length, np.int32)
    for row, of_row, shown in zip(index, counts, np.asarray(batch.visual_index), strict=True):
        where = np.full(sum(of_row), length, np.int32)
        place = np.flatnonzero(shown >= num_learned)
        where[shown[place] - num_learned] = place
        for number, part in enumerate(np.split(where, np.cumsum(of_row)[:-1].astype(int))):
            row[number, : len(part)] = part
    return VisualPlaces(index, ranking(batch))


def ranking(batch: Batch) -> np.ndarray:
    """True at the last position of each instruction: before each learned answer, or at the end of a segment without."""
    segments = np.asarray(batch.segment_ids)
    if batch.loss_weights is None:
        following = np.pad(segments[:, 1:], ((0, 0), (0, 1)), constant_values=PADDING_SEGMENT)
        return (segments != PADDING_SEGMENT) & (segments != following)
    learned = np.asarray(batch.loss_weights) > 0
    return learned & ~np.pad(learned[:, :-1], ((0, 0), (1, 0)))


def _packed(
    groups: Sequence[Sequence[int]], frames: Sequence[Sequence[int]], num_images: int, longest: int | None
) -> PackedImages:
    shape = (len(groups), max(num_images, 1))
    counts, numbers = np.zeros(shape, np.int32), np.ones(shape, np.int32)
    for table, given in ((counts, groups), (numbers, frames)):
        for row, own in zip(table, given, strict=True):
            row[: len(own)] = own
    starts = np.cumsum(counts, axis=1) - counts
    longest = longest or int(counts.max(initial=1)) or 1
    return PackedImages(starts.astype(np.int32), counts, longest=longest, frames=numbers)

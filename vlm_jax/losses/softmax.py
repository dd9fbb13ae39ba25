"""CLIP's softmax loss over rows and columns, and its distillation from a teacher's logits."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vlm_jax.losses.pairwise import Axis, Offset, Scalars, Tile, Towers, make_tile
from vlm_jax.types import Array, Tree


class Softmax(NamedTuple):
    """Running softmax sums, relative to the largest logit so far: exp(x - maximum) * value.

    `total` sums the values 1; `weighted`, where present, sums other values (the student's logits
    under the teacher's softmax).
    """

    maximum: jax.Array
    total: jax.Array
    weighted: Tree = None  # an array or None

    @property
    def log_total(self) -> jax.Array:
        return self.maximum + jnp.log(self.total)

    def relative_to(self, maximum: jax.Array) -> "Softmax":
        """The same sums, relative to another (larger) logit."""
        factor = jnp.exp(self.maximum - maximum)
        return Softmax(maximum, *jax.tree.map(lambda x: x * factor, (self.total, self.weighted)))


class Line(NamedTuple):
    """Statistics of rows or of columns: the logit of the matching pair, and both softmaxes."""

    positive: jax.Array
    student: Softmax
    teacher: Softmax | None


def _softmax(logits: jax.Array, axis: int, values: jax.Array | None = None) -> Softmax:
    maximum = jnp.max(logits, axis=axis)
    exponentials = jnp.exp(logits - jnp.expand_dims(maximum, axis))
    weighted = None if values is None else jnp.sum(exponentials * values, axis=axis)
    return Softmax(maximum, jnp.sum(exponentials, axis=axis), weighted)


def _line(tile: Tile, axis: int) -> Line:
    positive = jnp.sum(jnp.where(tile.positive, tile.student, 0.0), axis=axis)
    teacher = None if tile.teacher is None else _softmax(tile.teacher, axis, tile.student)
    return Line(positive, _softmax(tile.student, axis), teacher)


def _line_totals(line: Line) -> tuple[jax.Array, ...]:
    log_total = line.student.log_total
    contrastive = jnp.sum(log_total - line.positive)
    if line.teacher is None:
        return (contrastive,)
    return contrastive, jnp.sum(log_total - line.teacher.weighted / line.teacher.total)


@dataclasses.dataclass(frozen=True)
class SoftmaxObjective:
    """The mean of the cross-entropies of rows and columns; with a teacher, also the one with its softmax.

    Source: Radford et al. 2021 (CLIP), figure 3; open_clip's `DistillClipLoss` for the second part.
    """

    has_teacher: bool = False
    one_pass = False

    def full(self, own: Towers, every: Towers, scalars: Scalars, first: Offset) -> tuple[jax.Array, ...]:
        rows = Towers(own.image, every.text, own.teacher_image, every.teacher_text)
        columns = Towers(own.text, every.image, own.teacher_text, every.teacher_image)
        parts = [_line_totals(_line(make_tile(side, scalars, first), 1)) for side in (rows, columns)]
        return tuple((row + column) / (2 * own.image.shape[0]) for row, column in zip(*parts, strict=True))

    def empty(self, rows: int, columns: int) -> tuple[Line, Line]:
        def line(count):
            zeros = jnp.zeros(count, jnp.float32)
            # The lowest finite number: infinity minus infinity is NaN.
            lowest = jnp.full(count, jnp.finfo(jnp.float32).min)
            teacher = Softmax(lowest, zeros, zeros) if self.has_teacher else None
            return Line(zeros, Softmax(lowest, zeros), teacher)

        return line(rows), line(columns)

    def statistics(self, tile: Tile) -> tuple[Line, Line]:
        return _line(tile, 1), _line(tile, 0)

    def merge(self, left: Line, right: Line) -> Line:
        def softmax(left, right):
            maximum = jnp.maximum(left.maximum, right.maximum)
            sums = [x.relative_to(maximum)[1:] for x in (left, right)]
            return Softmax(maximum, *jax.tree.map(jnp.add, *sums))

        teacher = softmax(left.teacher, right.teacher) if self.has_teacher else None
        return Line(left.positive + right.positive, softmax(left.student, right.student), teacher)

    def combine(self, statistics: Line, axis: Axis | None) -> Line:
        def softmax(part):
            maximum = lax.pmax(part.maximum, axis)
            return Softmax(maximum, *lax.psum(part.relative_to(maximum)[1:], axis))

        teacher = softmax(statistics.teacher) if self.has_teacher else None
        return Line(lax.psum(statistics.positive, axis), softmax(statistics.student), teacher)

    def totals(self, rows: Line, columns: Line) -> tuple[jax.Array, ...]:
        return tuple((x + y) / 2 for x, y in zip(_line_totals(rows), _line_totals(columns), strict=True))

    def gradient(self, tile: Tile, rows: Line, columns: Line, weights: tuple[Array | float, ...]) -> jax.Array:
        def probabilities(logits, row, column):
            # Not exp(logits - log_total): the rounding error of a large log_total would affect the result.
            by_row = jnp.exp(logits - row.maximum[:, None]) / (2 * row.total[:, None])
            return by_row + jnp.exp(logits - column.maximum[None, :]) / (2 * column.total[None, :])

        student = probabilities(tile.student, rows.student, columns.student)
        gradient = weights[0] * (student - tile.positive)
        if not self.has_teacher:
            return gradient
        teacher = probabilities(tile.teacher, rows.teacher, columns.teacher)
        return gradient + weights[1] * (student - teacher)

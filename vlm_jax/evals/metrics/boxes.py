"""Grounding: boxes in an answer, compared with those of the reference."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from vlm_jax.evals.metrics.metric import MeanScore, Response, ratio
from vlm_jax.processors.boxes import Box as Corners
from vlm_jax.processors.boxes import intersection_over_union, parse_boxes

MIN_IOU = 0.5


class Box(MeanScore):
    """One box: accuracy at an intersection over union of 0.5, of finished answers; see `overlap`."""

    def score(self, response: Response) -> bool:
        """As `Metric.score`."""
        return response.is_finished and any(overlap(response.text, text) for text in response.references)


def overlap(answer: str, reference: str) -> bool:
    """Whether the answer has exactly one box, with an intersection over union of at least 0.5 with the reference's."""
    boxes, wanted = parse_boxes(answer), parse_boxes(reference)
    return len(boxes) == 1 and bool(wanted) and intersection_over_union(boxes[0], wanted[0]) >= MIN_IOU


class Boxes:
    """Any number of boxes, or none: those of answer and reference are paired, see `pairs`.

    The score of an answer is its F1; without boxes to find it is 1 for none, else 0. The values are the mean F1, the
    share of answers with an F1 of 1, and precision and recall of all boxes.

    Source: He et al. 2023 (gRefCOCO), section 4: Pr@(F1=1, IoU>=0.5). Deviation of its code: boxes are compared by the
    intersection over union that it names, not by the generalised one.
    """

    values: ClassVar[tuple[str, ...]] = ("mean", "all_right", "precision", "recall")
    num_statistics: ClassVar[int] = 6
    needs_all: ClassVar[bool] = False

    def score(self, response: Response) -> float:
        """As `Metric.score`."""
        return self._best(response)[0]

    def statistics(self, responses: Sequence[Response]) -> Float[np.ndarray, "responses statistics"]:
        """As `Metric.statistics`: F1, whether it is 1, and 1; pairs, boxes of the answer and of the reference."""
        rows = []
        for response in responses:
            f1, *counts = self._best(response)
            rows.append((f1, f1 == 1, 1, *counts))
        return np.array(rows, float).reshape(-1, self.num_statistics)

    def of_sums(self, sums: Float[np.ndarray, "*resamples statistics"]) -> Float[np.ndarray, "*resamples values"]:
        """As `Metric.of_sums`."""
        f1, right, count, paired, given, wanted = np.moveaxis(sums, -1, 0)
        shares = ratio(f1, count), ratio(right, count), ratio(paired, given), ratio(paired, wanted)
        return np.stack(shares, axis=-1)

    def _best(self, response: Response) -> tuple[float, int, int, int]:
        """F1, pairs, and boxes of the answer and of the reference, for the reference with the highest F1."""
        given, found = parse_boxes(response.text), []
        for reference in response.references:
            wanted = parse_boxes(reference)
            paired, boxes = pairs(given, wanted), len(given) + len(wanted)
            found.append((2 * paired / boxes if boxes else 1.0, paired, len(given), len(wanted)))
        return max(found)


def pairs(given: Sequence[Corners], wanted: Sequence[Corners]) -> int:
    """Pairs of boxes with an intersection over union of at least 0.5, the highest first; a box is in one of them."""
    table = np.array([[intersection_over_union(one, other) for other in wanted] for one in given])
    count = 0
    while table.size and table.max() >= MIN_IOU:
        row, column = np.unravel_index(table.argmax(), table.shape)
        table[row], table[:, column] = 0.0, 0.0
        count += 1
    return count

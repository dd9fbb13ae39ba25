"""Questions to answer with yes or no: POPE and MME."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from vlm_jax.evals.metrics.metric import Response, ratio


class Pope:
    """Accuracy, precision, recall and F1 of "yes", and the share of answers that are "yes".

    An answer is "no" if its first sentence has one of the words `no`, `No` and `not`, else "yes". A quotient without a
    divisor is 0.

    Source: Li et al. 2023 (POPE), section 5.1, and evaluate.py of RUCAIBox/POPE.
    """

    values: ClassVar[tuple[str, ...]] = ("accuracy", "precision", "recall", "f1", "yes_share")
    num_statistics: ClassVar[int] = 4
    needs_all: ClassVar[bool] = False

    def score(self, response: Response) -> bool:
        """As `Metric.score`."""
        return says_yes(response.text) == _is_yes(response)

    def statistics(self, responses: Sequence[Response]) -> Float[np.ndarray, "responses statistics"]:
        """As `Metric.statistics`: true and false positives, true and false negatives."""
        counts = np.zeros((len(responses), 2, 2))
        for count, response in zip(counts, responses, strict=True):
            said, wanted = says_yes(response.text), _is_yes(response)
            count[int(not said), int(said != wanted)] = 1
        return counts.reshape(-1, self.num_statistics)

    def of_sums(self, sums: Float[np.ndarray, "*resamples statistics"]) -> Float[np.ndarray, "*resamples values"]:
        """As `Metric.of_sums`."""
        hit, alarm, quiet, miss = np.moveaxis(sums, -1, 0)
        every = hit + alarm + quiet + miss
        shares = (
            ratio(hit + quiet, every),
            ratio(hit, hit + alarm),
            ratio(hit, hit + miss),
            ratio(2 * hit, 2 * hit + alarm + miss),
            ratio(hit + alarm, every),
        )
        return np.stack(shares, axis=-1)


def says_yes(answer: str) -> bool:
    """Whether an answer counts as "yes" in POPE."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"no", "No", "not"} & set(words)


def _is_yes(response: Response) -> bool:
    return response.references[0].strip().lower() != "no"


class Mme:
    """MME's pairs: accuracy of questions, of pictures whose questions are all right, and the sum of both in percent.

    The answer is "yes" or "no" by its first four letters. The two questions about a picture are those with equal
    pixels. Every subtask of MME is a task of its own, such as `mme:count`, with a score of at most 200. Where all
    subtasks of perception, or of cognition, have answers, the sums of their scores are the values `perception`, at most
    2000, and `cognition`, at most 800, of the task `mme`. Deviation: spaces before the answer are ignored.

    Source: Fu et al. 2023 (MME), section 2.2, and calculation.py of its evaluation tool.
    """

    values: ClassVar[tuple[str, ...]] = ("accuracy", "accuracy_plus", "score")
    num_statistics: ClassVar[int] = 4
    needs_all: ClassVar[bool] = True
    totals: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "perception": (
            *("existence", "count", "position", "color", "posters"),
            *("celebrity", "scene", "landmark", "artwork", "OCR"),
        ),
        "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
    }

    def score(self, response: Response) -> bool:
        """As `Metric.score`."""
        return yes_or_no(response.text) == response.references[0].strip().lower()

    def statistics(self, responses: Sequence[Response]) -> Float[np.ndarray, "responses statistics"]:
        """As `Metric.statistics`: right and 1; and for the first answer of each picture, whether all are, and 1."""
        right, asked = Counter[str](), Counter(response.group for response in responses)
        scores = [self.score(response) for response in responses]
        for response, score in zip(responses, scores, strict=True):
            right[response.group] += score
        rows, seen = np.zeros((len(responses), self.num_statistics)), set[str]()
        for row, response, score in zip(rows, responses, scores, strict=True):
            row[:2] = score, 1
            if response.group not in seen:
                seen.add(response.group)
                row[2:] = right[response.group] == asked[response.group], 1
        return rows

    def of_sums(self, sums: Float[np.ndarray, "*resamples statistics"]) -> Float[np.ndarray, "*resamples values"]:
        """As `Metric.of_sums`."""
        accuracy, plus = ratio(sums[..., 0], sums[..., 1]), ratio(sums[..., 2], sums[..., 3])
        return np.stack([accuracy, plus, 100 * (accuracy + plus)], axis=-1)


def yes_or_no(answer: str) -> str | None:
    """What an answer says in MME: `yes`, `no`, or None."""
    first = answer.strip().lower()[:4]
    return "yes" if "yes" in first else "no" if "no" in first else None

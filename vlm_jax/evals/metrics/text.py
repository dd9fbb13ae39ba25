"""Metrics of whole texts: equality, and the edit distance of what was read."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from rapidfuzz.distance import Levenshtein

from vlm_jax.evals.metrics.metric import MeanScore, Response, ratio
from vlm_jax.processors.normal_form import composed


class Exact(MeanScore):
    """Equality of a finished answer with a reference; see `same_text`."""

    def score(self, response: Response) -> bool:
        """As `Metric.score`."""
        return response.is_finished and any(same_text(response.text, text) for text in response.references)


class Characters:
    """What was read of a text, by the edit distance; an answer without an end counts as far as it was written.

    The score is `character_precision`. The values are its mean, and the error rates of characters and words: edits of
    all answers, each compared with the reference that is the nearest, divided by the length of these references. They
    may exceed 1.
    """

    values: ClassVar[tuple[str, ...]] = ("mean", "character_error_rate", "word_error_rate")
    num_statistics: ClassVar[int] = 6
    needs_all: ClassVar[bool] = False

    def score(self, response: Response) -> float:
        """As `Metric.score`."""
        return max(character_precision(response.text, text) for text in response.references)

    def statistics(self, responses: Sequence[Response]) -> Float[np.ndarray, "responses statistics"]:
        """As `Metric.statistics`: score and 1, edits and length in characters, the same in words."""
        rows = []
        for response in responses:
            text, references = clean(response.text), [clean(text) for text in response.references]
            scores = [character_precision(text, reference) for reference in references]
            nearest = references[int(np.argmax(scores))]
            words, wanted = text.split(), nearest.split()
            counts = Levenshtein.distance(text, nearest), len(nearest), Levenshtein.distance(words, wanted), len(wanted)
            rows.append((max(scores), 1.0, *counts))
        return np.array(rows, float).reshape(-1, self.num_statistics)

    def of_sums(self, sums: Float[np.ndarray, "*resamples statistics"]) -> Float[np.ndarray, "*resamples values"]:
        """As `Metric.of_sums`."""
        return ratio(sums[..., 0::2], sums[..., 1::2])


def clean(text: str) -> str:
    """A text without spaces at its ends, in Unicode's composed form."""
    return composed(text).strip()


def same_text(answer: str, reference: str) -> bool:
    """Equality of texts, ignoring spaces at the ends and how Unicode composes a character."""
    return clean(answer) == clean(reference)


def character_precision(answer: str, reference: str) -> float:
    """1 - Levenshtein's distance, as a share of the longer of the two texts; spaces at their ends are ignored.

    Source: the normalized edit distance of OmniDocBench, subtracted from 1. DeepSeek-OCR (arXiv 2510.18234, figure 1)
    reports a precision by text tokens per visual token, without a formula.
    """
    answer, reference = clean(answer), clean(reference)
    return 1.0 - Levenshtein.distance(answer, reference) / max(len(answer), len(reference), 1)

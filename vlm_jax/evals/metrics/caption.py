"""Captions: CIDEr, BLEU and ROUGE-L, as in the evaluation of COCO captions."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from vlm_jax.evals.metrics.metric import Response, ratio

LONGEST = 4  # n-grams
SIGMA = 6.0  # of CIDEr's penalty of the difference in length
BETA = 1.2  # of ROUGE-L

_ABBREVIATIONS = "dr|etc|inc|jr|mr|mrs|ms|mt|sr|st|vs"
_TOKEN = re.compile(
    rf"""(?:[a-z]\.){{2,}}              # u.s.
    | \b(?:{_ABBREVIATIONS})\.
    | \bno\.(?=\s*\d)                 # no. 5
    | (?:(?<!\S)\.)?\d+(?:[.,:/]\d+)*[a-z]*  # 1,000, 3:30, 5th, .5
    | \w+(?:[-'/]\w+)*                # t-shirt, o'clock, a/b
    | [!?]{{2,}}
    | [^\w\s]""",
    re.VERBOSE,
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_REMOVED = frozenset("'\"`.?!,:;-")
# Words that are two.
_DIVIDED = {"cannot": "can not", "gimme": "gim me", "gonna": "gon na", "gotta": "got ta", "lemme": "lem me"}
_DIVIDED |= {"wanna": "wan na"}
_CLITIC = re.compile(r"^(.+?)(n't|'(?:s|m|d|ll|re|ve))$")
_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", **dict.fromkeys("\u201c\u201d\u2026\u2013\u2014", " ")})

Gram = tuple[str, ...]


class Caption:
    """ROUGE-L of every caption; ROUGE-L, CIDEr and BLEU of all.

    The score of a caption is its ROUGE-L, the only one of the three that does not depend on the other captions. CIDEr
    is in [0, 10], and often reported in percent; its document frequencies are those of the references of all answers.

    Source: pycocoevalcap (salaniz/pycocoevalcap, its `rouge`, `cider` and `bleu`): Lin 2004, Vedantam et al. 2015
    (CIDEr-D) and Papineni et al. 2002. Deviations: BLEU is 0 where no n-gram of a length is found, and words are those
    of `words`.
    """

    values: ClassVar[tuple[str, ...]] = ("rouge_l", "cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4")
    num_statistics: ClassVar[int] = 5 + 2 * LONGEST
    needs_all: ClassVar[bool] = True

    def score(self, response: Response) -> float:
        """As `Metric.score`."""
        return rouge_l(words(response.text), [words(text) for text in response.references])

    def statistics(self, responses: Sequence[Response]) -> Float[np.ndarray, "responses statistics"]:
        """As `Metric.statistics`: 1, ROUGE-L, CIDEr; words, and of the nearest reference; n-grams found, and said."""
        said = [words(response.text) for response in responses]
        wanted = [[words(text) for text in response.references] for response in responses]
        rows = []
        for caption, references, consensus in zip(said, wanted, cider(said, wanted), strict=True):
            lengths = len(caption), _nearest_length(caption, references)
            rows.append((1.0, rouge_l(caption, references), consensus, *lengths, *_found(caption, references)))
        return np.array(rows, float).reshape(-1, self.num_statistics)

    def of_sums(self, sums: Float[np.ndarray, "*resamples statistics"]) -> Float[np.ndarray, "*resamples values"]:
        """As `Metric.of_sums`."""
        count, rouge, consensus, said, wanted = np.moveaxis(sums[..., :5], -1, 0)
        found = ratio(sums[..., 5 : 5 + LONGEST], sums[..., 5 + LONGEST :])
        means = np.cumprod(found, axis=-1) ** (1 / np.arange(1, LONGEST + 1))
        brevity = np.where(said > 0, np.exp(np.minimum(0.0, 1 - ratio(wanted, said))), 0.0)
        first = np.stack([ratio(rouge, count), ratio(consensus, count)], axis=-1)
        return np.concatenate([first, brevity[..., None] * means], axis=-1)


def words(text: str) -> list[str]:
    """The words of a caption in lower case, without marks at the ends of sentences and clauses, and without quotes.

    Contractions and possessives are two words, `do n't` and `man 's`; hyphens stay; brackets become `-lrb-` and so on.

    Source: what PTBTokenizer of Stanford CoreNLP 3.4.1 and the list of pycocoevalcap's ptbtokenizer.py leave of a
    caption. Deviations: abbreviations are those of a short list; web addresses are divided.
    """
    found: list[str] = []
    for token in _TOKEN.findall(text.lower().translate(_PLAIN)):
        if token in _REMOVED:
            continue
        parts = _CLITIC.match(token)
        word: str = _DIVIDED.get(token) or _BRACKETS.get(token) or token
        found += parts.groups() if parts else word.split()
    return found


def rouge_l(caption: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """F of the longest common subsequences, with the highest precision and the highest recall of any reference."""
    common = [_longest_common(caption, reference) for reference in references]
    precision = max(length / max(len(caption), 1) for length in common)
    recall = max(length / max(len(reference), 1) for length, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for mine in first:
        before = 0
        for place, theirs in enumerate(second, start=1):
            kept = row[place]
            row[place] = before + 1 if mine == theirs else max(kept, row[place - 1])
            before = kept
    return row[-1]


def _grams(caption: Sequence[str], length: int) -> Counter[Gram]:
    return Counter(tuple(caption[start : start + length]) for start in range(len(caption) - length + 1))


def _nearest_length(caption: Sequence[str], references: Sequence[Sequence[str]]) -> int:
    """Length of the reference whose length is the nearest, the shorter one of two."""
    return min((abs(len(reference) - len(caption)), len(reference)) for reference in references)[1]


def _found(caption: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
    """N-grams that are found, each as often as in one of the references; and n-grams of the caption."""
    found, said = [], []
    for length in range(1, LONGEST + 1):
        most: Counter[Gram] = Counter()
        for reference in references:
            most |= _grams(reference, length)
        mine = _grams(caption, length)
        found.append((mine & most).total())
        said.append(mine.total())
    return found + said


def cider(said: Sequence[Sequence[str]], wanted: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of every caption, in [0, 10].

    Args:
      said: words of the captions.
      wanted: words of the references of each.
    """
    documents: Counter[Gram] = Counter()
    for references in wanted:
        documents.update(
            {gram for one in references for length in range(1, LONGEST + 1) for gram in _grams(one, length)}
        )

    def weighted(caption: Sequence[str], length: int) -> dict[Gram, float]:
        rarity = math.log(max(len(said), 1))
        counts = _grams(caption, length).items()
        return {gram: count * (rarity - math.log(max(documents[gram], 1))) for gram, count in counts}

    scores = []
    for caption, references in zip(said, wanted, strict=True):
        mine, total = [weighted(caption, length) for length in range(1, LONGEST + 1)], 0.0
        for reference in references:
            # Lengths are counted in pairs of words.
            longer = max(len(caption) - 1, 0) - max(len(reference) - 1, 0)
            theirs = [weighted(reference, length) for length in range(1, LONGEST + 1)]
            alike = sum(_cosine(one, other) for one, other in zip(mine, theirs, strict=True)) / LONGEST
            total += alike * math.exp(-(longer**2) / (2 * SIGMA**2))
        scores.append(10 * total / len(references))
    return scores


def _cosine(mine: dict[Gram, float], theirs: dict[Gram, float]) -> float:
    """Of two weighted captions, of which what the first has more often counts as often as in the second."""
    norms = math.hypot(*mine.values()) * math.hypot(*theirs.values())
    shared = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in mine.items() if gram in theirs)
    return shared / norms if norms else 0.0

"""Metrics of short answers: VQA accuracy, ANLS, relaxed accuracy."""

import functools
import re

from rapidfuzz.distance import Levenshtein

from vlm_jax.evals.metrics.metric import MeanScore, Response

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(DIGITS)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# A word of these that lacks one of its apostrophes gets it.
CONTRACTIONS = (
    "'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've "
    "mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's "
    "there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll "
    "what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's "
    "won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
)
THRESHOLD = 0.5  # of ANLS
MAX_RELATIVE_CHANGE = 0.05


class VqaAccuracy(MeanScore):
    """Agreement with three of ten people: min(1, equal answers among nine of them / 3), over all choices of nine.

    Texts are compared as by `normalised_answer`, unless all people say the same: then as they are, but for spaces.
    Deviation: with a single reference, the accuracy is equality of the normalised texts.

    Source: Antol et al. 2015, section 3, and VQAEval of GT-Vision-Lab/VQA.
    """

    def score(self, response: Response) -> float:
        """As `Metric.score`."""
        people, answer = [_on_one_line(text) for text in response.references], _on_one_line(response.text)
        if len(people) == 1 or len(set(people)) > 1:
            people, answer = [normalised_answer(text) for text in people], normalised_answer(answer)
        equal = [text == answer for text in people]
        if len(people) == 1:
            return float(equal[0])
        return sum(min(1.0, (sum(equal) - own) / 3) for own in equal) / len(equal)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalised_answer(text: str) -> str:
    """A text in lower case, without punctuation and articles, with digits for numbers and apostrophes in contractions.

    A mark of `PUNCTUATION` is removed where it is next to a space somewhere in the text, or where the text has a comma
    between digits; elsewhere it becomes a space. Full stops are removed that no digit follows.

    Source: VQAEval of GT-Vision-Lab/VQA, which spells one word, "somebody'd", without its apostrophe.
    """
    has_number = re.search(r"\d,\d", text) is not None
    marks = {mark: "" if has_number or f"{mark} " in text or f" {mark}" in text else " " for mark in PUNCTUATION}
    words = re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(marks))).lower().split()
    known = (NUMBERS.get(word, word) for word in words)
    return " ".join(_apostrophes().get(word, word) for word in known if word not in ARTICLES)


@functools.cache
def _apostrophes() -> dict[str, str]:
    """{word without one of its apostrophes: word}."""
    found = {"somebody'd": "somebodyd"}
    for word in CONTRACTIONS.split():
        found |= {word[:place] + word[place + 1 :]: word for place, letter in enumerate(word) if letter == "'"}
    return found


class Anls(MeanScore):
    """Average normalised Levenshtein similarity: of the nearest reference, 0 where half of the text or more differs.

    Case, and the number of spaces, are ignored.

    Source: Biten et al. 2019 (ST-VQA), section 4, and Mathew et al. 2021 (DocVQA), section 5.1.
    """

    def score(self, response: Response) -> float:
        """As `Metric.score`."""
        answer = _plain(response.text)
        shares = [_distance(answer, _plain(text)) for text in response.references]
        return max(1.0 - share if share < THRESHOLD else 0.0 for share in shares)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _distance(first: str, second: str) -> float:
    """Levenshtein's distance as a share of the longer text."""
    return Levenshtein.distance(first, second) / max(len(first), len(second), 1)


class RelaxedAccuracy(MeanScore):
    """Numbers within 5% of the reference, other texts if they are equal but for case.

    `50%` is 0.5. Where the reference is 0, or is no number, texts are compared. Deviation: spaces at the ends are
    ignored.

    Source: Masry et al. 2022 (ChartQA), section 5.1, and `relaxed_correctness` of google-research/pix2struct.
    """

    def score(self, response: Response) -> bool:
        """As `Metric.score`."""
        return any(is_near(response.text, text) for text in response.references)


def is_near(answer: str, reference: str) -> bool:
    """Whether an answer is within 5% of the reference; see `RelaxedAccuracy`."""
    answer, reference = answer.strip(), reference.strip()
    given, wanted = _number(answer), _number(reference)
    if given is None or not wanted:
        return answer.lower() == reference.lower()
    return abs(given - wanted) / abs(wanted) <= MAX_RELATIVE_CHANGE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None

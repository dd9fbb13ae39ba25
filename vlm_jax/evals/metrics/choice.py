"""Multiple choice by the letter, or the text, of an option in the answer."""

import re
from collections.abc import Mapping

from vlm_jax.evals.metrics.metric import MeanScore, Response

_OPTION = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
LETTERS = "ABCDE"  # that answers may have whatever the options are
# What is around the letter of a word, in the order in which they are looked for.
_AROUND = (
    *(("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")),
    *((":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
)


class Choice(MeanScore):
    """The chosen option, of those that the question lists: lines such as `A. a cat`, `A) a cat` or `(A) a cat`.

    A reference is a letter, or the text of an option.

    Source: `can_infer` of MMBench's evaluator; what it cannot infer is wrong, and no language model is asked.
    """

    def score(self, response: Response) -> bool:
        """As `Metric.score`."""
        options = options_of(response.question)
        chosen = chosen_letter(response.text, options)
        return chosen is not None and chosen in {_letter_of(text, options) for text in response.references}


def options_of(question: str) -> dict[str, str]:
    """{letter: text} of the options that a question lists, in order."""
    return dict(_OPTION.findall(question))


def _letter_of(reference: str, options: Mapping[str, str]) -> str:
    """The letter of a right answer, `B`, `(B)` or `B.`, or the text of its option."""
    letter = reference.strip(" \t\n().:").upper()
    if len(letter) == 1:
        return letter
    return next((option for option, text in options.items() if text.lower() == reference.strip().lower()), letter)


def chosen_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer has alone, or else of the option whose text it has alone; None without either.

    `A` in an answer of more than three words is taken for the article.

    Args:
      answer: of the model.
      options: as of `options_of`.
    """
    words, letters = answer.split(), sorted({*LETTERS, *options})
    for before, after in _AROUND:
        found = [letter for letter in letters if f"{before}{letter}{after}" in words]
        is_article = (before, after, found) == ("", "", ["A"]) and len(words) > 3
        if len(found) == 1 and not is_article:
            return found[0]
    told = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return told[0] if len(told) == 1 else None

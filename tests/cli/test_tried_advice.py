"""Every advice of a message is followed by a test, which marks it by `tests.advice.tried`."""

import re

import pytest

from ..advice import HOLE, NO_ADVICE, OTHERS, VERBS, advice, is_advice, marks, messages, tried, with_holes
from .untried import UNTRIED


@pytest.fixture(scope="module")
def texts():
    return advice()


def fitting(words, texts):
    """The text that a mark's words are, or those that they are a part of."""
    return [words] if words in texts else [text for text in texts if words in text]


@pytest.fixture(scope="module")
def followed(texts):
    """The texts whose advice a test follows."""
    return {text for _, words in marks() for text in fitting(words, texts)}


def test_every_advice_is_followed_by_a_test(texts, followed):
    """A new message needs a test that follows its advice: see `tests/advice.py`."""
    known = {text for words in UNTRIED for text in fitting(with_holes(words), texts)}
    lacking = [f"{file}: {text.replace(HOLE, '{}')}" for text, file in texts.items() if text not in followed | known]
    assert not lacking, "\n".join(["no test follows the advice of:", *lacking])


def test_what_is_untried_is_so(texts, followed):
    """An advice that is now followed, or is gone, leaves the list."""
    for words in UNTRIED:
        found = fitting(with_holes(words), texts)
        assert len(found) == 1, (words, found)
        assert found[0] not in followed, f"a test follows it: remove {words!r} from untried.py"
    assert len(set(UNTRIED)) == len(UNTRIED)


def test_every_mark_is_of_one_message(texts):
    for file, words in marks():
        assert len(fitting(words, texts)) == 1, (file, words, fitting(words, texts))


def test_every_word_after_a_semicolon_is_known():
    """Advice begins by a verb, or else the walk would not see it."""
    found = {word for _, text in messages() for word in re.findall(r"; (?:or )?([a-z_]+) ", text)}
    assert set(OTHERS.split("|")) <= found <= set(f"{VERBS}|{OTHERS}".split("|"))
    assert {text for _, text in messages()} >= NO_ADVICE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("config.x: needs tiles; set it to False", True),
        ("too long, or raise the limit", True),
        ("files differ. Merge them first", True),
        ("remove", False),
        ("expected a tile, got None", False),
        ("settings of a set", False),
    ],
)
def test_advice_is_told_by_its_verb(text, expected):
    assert is_advice(text) == expected


def test_words_fit_the_text_and_the_message():
    words = "raise {config.row.length} by {} or more ({{x}})"
    assert with_holes(words) == f"raise {HOLE} by {HOLE} or more ({{x}})"
    assert re.search(tried(words), "…; raise config.row.length by 6 or more ({x})")
    assert not re.search(tried(words), "…; raise config_row_length by 6 or more ({x})")

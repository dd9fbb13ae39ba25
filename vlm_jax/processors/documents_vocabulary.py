"""The built-in vocabulary of the pages of text: characters, and capital words for what is asked.

Every character of a page is a separate token. The words of questions are in capitals, which no page has, so that the
letters of a page are never taken for a word.
"""

from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.word_level import word_level_tokenizer

TASK_WORDS = ("READ", "LINE", "OF", "BY")
CHARACTERS = tuple("abcdefghijklmnopqrstuvwxyz0123456789")

# A special token, a capital word, or any other single character; the spaces between them are dropped.
_WORD = r"<[a-z]+>|[A-Z]+|\S"


def documents_tokenizer() -> Tokenizer:
    """The tokenizer of the pages of text.

    `decode(encode(text)) == text` for `READ 8 BY 16`, `READ LINE 3 OF 8 BY 16` and `read7by4`, eight characters.
    """
    return word_level_tokenizer(TASK_WORDS, CHARACTERS, _WORD, "the vocabulary of the pages of text")

"""The built-in word-level vocabulary of the digit pages.

Every digit is a separate token, and numbers have no spaces: the row of the
digits 7, 4, 1, 9 is `7419`, four tokens, which decode to `7419`.
"""

from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.word_level import word_level_tokenizer

TASK_WORDS = ("read", "transcribe", "count", "locate", "row", "column")
DIGITS = tuple("0123456789")
BOX_TOKENS = ("<box>", "</box>", "(", ")", ",")

# A tag, a digit, a word, or any other single character; the spaces between them are dropped.
_WORD = r"</?[a-z]+>|[0-9]|[^\s0-9<>(),]+|\S"


def digits_tokenizer() -> Tokenizer:
    """The tokenizer of the digit pages' questions and answers.

    `decode` returns the canonical text: one space around every task word, none elsewhere, so
    `decode(encode(text)) == text` for `read row 2 column 3`, `7419` and `<box>(12,30),(450,999)</box>`.
    """
    return word_level_tokenizer(TASK_WORDS, (*DIGITS, *BOX_TOKENS), _WORD, "the digit pages' vocabulary")

"""The built-in word-level vocabulary of the digit pages.

Every digit is a separate token, and numbers have no spaces: the row of the
digits 7, 4, 1, 9 is `7419`, four tokens, which decode to `7419`.
"""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.vocabulary import TokenizersVocabulary

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<image>", "<unk>")
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
    words = (*SPECIAL_TOKENS, *TASK_WORDS, *DIGITS, *BOX_TOKENS)
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(word, f" {word} ") for word in TASK_WORDS]
        + [decoders.Fuse(), decoders.Replace("  ", " "), decoders.Replace(tokenizers.Regex("^ +| +$"), "")]
    )
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    roles = ("pad", "bos", "eos", "image", "unk")
    names: dict[str, str] = {f"{role}_token": token for role, token in zip(roles, SPECIAL_TOKENS, strict=True)}
    return Tokenizer(TokenizersVocabulary(backend), names, origin="the digit pages' vocabulary")

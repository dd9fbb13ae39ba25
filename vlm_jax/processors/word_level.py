"""Built-in vocabularies of words and characters, for the sources that compose their own pages."""

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.vocabulary import TokenizersVocabulary

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<image>", "<unk>")


def word_level_tokenizer(words: Sequence[str], others: Sequence[str], pattern: str, origin: str) -> Tokenizer:
    """A tokenizer of whole words, whose ids are those of SPECIAL_TOKENS, `words` and `others` in this order.

    `decode` returns the canonical text: one space around every word, none elsewhere.

    Args:
      words: no one is a part of another, or of one of `others`.
      others: characters and marks.
      pattern: regular expression of one token of a text; what is between tokens is dropped.
      origin: its source, for errors.
    """
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *words, *others))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="removed", invert=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(word, f" {word} ") for word in words]
        + [decoders.Fuse(), decoders.Replace("  ", " "), decoders.Replace(tokenizers.Regex("^ +| +$"), "")]
    )
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    roles = ("pad", "bos", "eos", "image", "unk")
    names: dict[str, str] = {f"{role}_token": token for role, token in zip(roles, SPECIAL_TOKENS, strict=True)}
    return Tokenizer(TokenizersVocabulary(backend), names, origin=origin)

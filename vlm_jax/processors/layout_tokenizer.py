"""The tokenizer of training records, whose texts may spell no special and no unknown token."""

import functools
import os
from typing import Any

import tokenizers

from vlm_jax.processors.tokenizer import Tokenizer, read_backend
from vlm_jax.processors.vocabulary import TokenizersVocabulary

# Distinct texts whose ids are kept: questions and short answers repeat all through a run.
CACHED_TEXTS = 1 << 16


class UnknownText(ValueError):
    """A text that the vocabulary cannot spell; the message names the text and the word."""


class LayoutTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` with the four special tokens that a layout needs.

    Attributes:
      pad_id: fills a row after (or before) its sequence.
      bos_id: begins every sequence.
      eos_id: ends every answer.
      image_id: stands where a visual token goes.
    """

    bos_id: int
    eos_id: int
    pad_id: int

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        pad: str = "<pad>",
        bos: str = "<bos>",
        eos: str = "<eos>",
        image: str = "<image>",
        origin: str = "the tokenizer",
    ):
        """Wraps `backend`.

        Args:
          backend: the library's tokenizer.
          pad: name of the padding token, in the vocabulary.
          bos: name of the token that begins a sequence; may be another's name.
          eos: name of the token that ends an answer.
          image: name of the token that holds a visual token's place.
          origin: where the tokenizer is from, for messages.

        Raises:
          TokenizerError: a special token is not in the vocabulary.
        """
        names = {"pad_token": pad, "bos_token": bos, "eos_token": eos, "image_token": image}
        super().__init__(TokenizersVocabulary(backend), names, origin)
        self.image_id = self.id_of(image)
        self._backend = backend
        self._special = {self.id_of(name): name for name in names.values()}
        unknown = getattr(backend.model, "unk_token", None)
        self._unknown_id = backend.token_to_id(unknown) if unknown else None
        self._encode_once = functools.lru_cache(CACHED_TEXTS)(self._checked_ids)

    def __getstate__(self) -> dict[str, Any]:
        """For an input worker, which fills a cache of its own."""
        return {key: value for key, value in self.__dict__.items() if key != "_encode_once"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._encode_once = functools.lru_cache(CACHED_TEXTS)(self._checked_ids)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **names: str) -> "LayoutTokenizer":
        """Reads a `tokenizer.json`.

        Args:
          path: of the file, local or `gs://`.
          **names: of the special tokens, as the constructor takes them.

        Raises:
          FileNotFoundError: there is no such file.
          TokenizerError: the file is no tokenizer, or lacks a special token.
        """
        return cls(read_backend(path), origin=os.fspath(path), **names)

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """The ids of a text; `add_special` puts BOS and EOS about it.

        Raises:
          UnknownText: a word is not in the vocabulary, or is the name of a special token, which a
            text may not smuggle in.
        """
        ids = list(self._encode_once(text))
        return [self.bos_id, *ids, self.eos_id] if add_special else ids

    def _checked_ids(self, text: str) -> tuple[int, ...]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id == self._unknown_id:
                raise UnknownText(f"the vocabulary has no '{text[start:end]}', in the text '{text}'")
            if token_id in self._special:
                raise UnknownText(f"the special token {self._special[token_id]} may not stand in a text, here '{text}'")
        return tuple(encoding.ids)

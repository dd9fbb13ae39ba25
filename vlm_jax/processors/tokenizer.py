"""Text to vocabulary ids and back, over the Hugging Face `tokenizers` library."""

import functools
import os
from collections.abc import Sequence

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int

# Distinct texts whose ids are kept: questions and short answers repeat all through a run.
CACHED_TEXTS = 1 << 16


class UnknownText(ValueError):
    """A text that the vocabulary cannot spell; the message names the text and the word."""


class Tokenizer:
    """A `tokenizers.Tokenizer` with the four special tokens that a layout needs.

    Attributes:
      vocab_size: number of ids, special tokens among them.
      pad_id: fills a row after (or before) its sequence.
      bos_id: begins every sequence.
      eos_id: ends every answer.
      image_id: stands where a visual token goes.
    """

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
          ValueError: a special token is not in the vocabulary.
        """
        names = {"pad": pad, "bos": bos, "eos": eos, "image": image}
        found = {role: backend.token_to_id(name) for role, name in names.items()}
        ids = {role: token_id for role, token_id in found.items() if token_id is not None}
        missing = [f"{role} token '{name}'" for role, name in names.items() if role not in ids]
        if missing:
            raise ValueError(f"{origin}: {', '.join(missing)} not in its vocabulary; give the names that it uses")
        self._backend = backend
        self._special = {ids[role]: names[role] for role in ids}
        unknown = getattr(backend.model, "unk_token", None)
        self._unknown_id = backend.token_to_id(unknown) if unknown else None
        self.vocab_size = backend.get_vocab_size()
        self.pad_id = ids["pad"]
        self.bos_id = ids["bos"]
        self.eos_id = ids["eos"]
        self.image_id = ids["image"]
        self._encode_once = functools.lru_cache(CACHED_TEXTS)(self._checked_ids)

    @classmethod
    def from_file(cls, path: str | os.PathLike, **names: str) -> "Tokenizer":
        """Reads a `tokenizer.json`.

        Args:
          path: of the file, local or `gs://`.
          **names: of the special tokens, as the constructor takes them.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is no tokenizer, or lacks a special token.
        """
        text = epath.Path(path).read_text()
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path}: not a tokenizer.json of the tokenizers library: {error}") from error
        return cls(backend, origin=os.fspath(path), **names)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special token is added.

        Raises:
          UnknownText: a word is not in the vocabulary, or is the name of a special token, which a
            text may not smuggle in.
        """
        return list(self._encode_once(text))

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "T"]) -> str:
        """The text of ids, a list or a row of an array; special tokens are left out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def _checked_ids(self, text: str) -> tuple[int, ...]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id == self._unknown_id:
                raise UnknownText(f"the vocabulary has no '{text[start:end]}', in the text '{text}'")
            if token_id in self._special:
                raise UnknownText(f"the special token {self._special[token_id]} may not stand in a text, here '{text}'")
        return tuple(encoding.ids)

"""The tokenizer of a checkpoint folder, with the names of its special tokens."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int
from tokenizers import AddedToken

from vlm_jax.config import did_you_mean
from vlm_jax.paths import read_text, regular
from vlm_jax.processors.vocabulary import (
    SentencePieceVocabulary,
    TiktokenVocabulary,
    TokenizersVocabulary,
    Vocabulary,
)
from vlm_jax.released_json import read_released
from vlm_jax.types import Config, Fields

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "paligemma_tokenizer.model")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "qwen.tiktoken", "paligemma_tokenizer.model"),
    "vocab.json with merges.txt",
)
# Defaults of tokenizer classes for settings missing in files, by the SentencePiece model's names of the start
# and the end of a text. transformers, models/{llama,siglip,gemma}/tokenization_*.py.
SENTENCEPIECE_DEFAULTS: dict[tuple[str | None, str | None], Fields] = {
    ("<s>", "</s>"): {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True},
    (None, "</s>"): {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>", "add_eos_token": True},
    ("<bos>", "<eos>"): {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "add_bos_token": True,
    },
}


class TokenizerError(ValueError):
    """A folder without a readable tokenizer, or a missing token; the message names it."""


class Tokenizer:
    """A vocabulary with the roles of its special tokens.

    Attributes:
      vocabulary: encodes and decodes texts.
      names: the special tokens of templates, `{"bos_token": "<s>", ...}`.
      vocab_size: the largest id + 1; a model's table may have more rows.
      bos_id, eos_id, pad_id, unknown_id: None where the release has none.
      special_ids: ids that `decode` omits by default.
      origin: its source, for errors.
    """

    def __init__(self, vocabulary: Vocabulary, names: Mapping[str, str] | None = None, origin: str = "the tokenizer"):
        """Wraps `vocabulary`.

        Raises:
          TokenizerError: a token of `names` is not in it.
        """
        self.vocabulary, self.names, self.origin = vocabulary, dict(names or {}), origin
        ids = {role: vocabulary.id_of(name) for role, name in self.names.items()}
        missing = [f"{role} '{self.names[role]}'" for role, index in ids.items() if index is None]
        if missing:
            raise TokenizerError(
                f"{origin}: {', '.join(missing)} not in its vocabulary; use the names in the vocabulary"
            )
        self.vocab_size = vocabulary.size
        roles = ("bos", "eos", "pad", "unk")
        self.bos_id, self.eos_id, self.pad_id, self.unknown_id = (ids.get(f"{role}_token") for role in roles)
        self.special_ids = frozenset(vocabulary.special) | {index for index in ids.values() if index is not None}

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """The ids of a text; names of special and added tokens are encoded as these tokens.

        Args:
          text: any text.
          add_special: adds the release's start and end tokens, such as the BOS; not for the output of a
            chat template, which has them already.

        Raises:
          TokenizerError: it is no text, or has half of a surrogate pair.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"expected a text, got {text!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            letter = text[error.start]
            raise TokenizerError(f"expected Unicode text, got one with {letter!r}, half of a character") from error
        return self.vocabulary.encode(text, add_special)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, "T"], *, skip_special: bool = True) -> str:
        """The text of ids; special tokens are omitted, or written by their names. Ids without a token are omitted."""
        skipped = self.special_ids if skip_special else frozenset()
        return self.vocabulary.decode([int(index) for index in ids if int(index) not in skipped])

    def id_of(self, token: str) -> int:
        """The id of one token by its name.

        Raises:
          TokenizerError: there is none; the message suggests a similar one.
        """
        index = self.vocabulary.id_of(token) if isinstance(token, str) else None
        if index is None:
            near = did_you_mean(str(token), self.vocabulary.special.values())
            raise TokenizerError(f"{self.origin}: its vocabulary has no token '{token}'{near}")
        return index

    def check_rows(self, ids: Iterable[int], rows: int | None, where: str) -> None:
        """Checks the ids of a text against a model's table.

        Args:
          ids: of the text.
          rows: number of rows of the table; None where a text cannot have other ids.
          where: name of the text for errors.

        Raises:
          TokenizerError: the table has no row for one of them.
        """
        outside = next((index for index in ids if rows is not None and index >= rows), None)
        if outside is not None:
            token = self.decode([outside], skip_special=False)
            raise TokenizerError(
                f"{where}: the token '{token}' has the id {outside}, but the model's table has only {rows} rows; "
                "leave it out of the text, or use the tokenizer that belongs to the model"
            )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], names: Mapping[str, str]) -> "Tokenizer":
        """Reads a `tokenizer.json`, local or `gs://`, with the `names` of its special tokens.

        Raises:
          FileNotFoundError: there is no such file.
          TokenizerError: the file is not a tokenizer, or lacks a special token.
        """
        backend = read_backend(path)
        unknown = getattr(backend.model, "unk_token", None)
        names = {**names, **({"unk_token": unknown} if unknown else {})}
        return cls(TokenizersVocabulary(backend), names, origin=os.fspath(path))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint folder, local or `gs://`.

        Raises:
          TokenizerError: the folder has none, or one that cannot be read.
        """
        folder = epath.Path(folder)
        settings = _json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in settings:
            settings |= _json(folder / "special_tokens_map.json")
        if (folder / "tokenizer.json").exists():
            backend = read_backend(folder / "tokenizer.json")
            vocabulary = TokenizersVocabulary(backend, _by_name(_added(folder, settings)))
        elif name := next((name for name in SENTENCEPIECE_FILES if (folder / name).exists()), None):
            vocabulary, settings = _sentencepiece(folder, name, settings)
        elif (folder / "qwen.tiktoken").exists():
            # A text-only Qwen has a config without vision settings.
            config = _json(folder / "config.json")
            ranks = regular(folder / "qwen.tiktoken", TokenizerError).read_bytes()
            vocabulary = TiktokenVocabulary(ranks, visual=not config or "visual" in config)
            settings = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **settings}
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            vocabulary, settings = _pairs(folder, settings)
        else:
            raise TokenizerError(f"{folder}: no tokenizer here; looked for {', '.join(TOKENIZER_FILES)}")
        return cls(vocabulary, _names(settings), origin=os.fspath(folder))


def read_backend(path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """Reads a `tokenizer.json`.

    Raises:
      FileNotFoundError: there is no such file.
      TokenizerError: the file is not a tokenizer.
    """
    text = read_text(path, TokenizerError)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises a bare Exception
        raise TokenizerError(f"{path}: not a tokenizer.json of the tokenizers library: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _sentencepiece(folder: epath.Path, name: str, settings: Fields) -> tuple[Vocabulary, Fields]:
    """The vocabulary, and the settings with the defaults of the releases' tokenizer classes."""
    model = regular(folder / name, TokenizerError).read_bytes()
    bare = SentencePieceVocabulary(model, {}, bos=None, eos=None)
    settings = {**SENTENCEPIECE_DEFAULTS.get(bare.edge_names, {}), **settings}
    added, following = _added(folder, settings), bare.size
    ids: dict[str, int] = {}
    for index, token in added:
        index = bare.id_of(token.content) if index is None else index
        if index is None:
            index = max([following, *(known + 1 for known in ids.values())])
        ids.setdefault(token.content, index)
    by_id = {ids[name]: token for name, token in _by_name(added).items()}
    bos, eos = (ids.get(_name(settings.get(f"{role}_token")) or "") for role in ("bos", "eos"))
    vocabulary = SentencePieceVocabulary(
        model,
        by_id,
        bos=bos if settings.get("add_bos_token", False) else None,
        eos=eos if settings.get("add_eos_token", False) else None,
        legacy=settings.get("legacy") is not False,
        listed={_token(value, special=True).content for value in _special(settings)},
    )
    return vocabulary, settings


def _pairs(folder: epath.Path, settings: Fields) -> tuple[Vocabulary, Fields]:
    """The byte-pair vocabulary of a supported class, and the settings with its defaults."""
    kind = str(settings.get("tokenizer_class"))
    files = _json(folder / "vocab.json"), read_text(folder / "merges.txt", TokenizerError).splitlines()
    if kind.startswith("Qwen2Tokenizer"):
        return TokenizersVocabulary.qwen2(*files, _by_name(_added(folder, settings))), settings
    if kind.startswith("CLIPTokenizer"):
        end = "<|endoftext|>"
        settings = {"bos_token": "<|startoftext|>", **dict.fromkeys(("eos_token", "pad_token", "unk_token"), end)} | (
            settings
        )
        ends = (_name(settings["bos_token"]) or "", _name(settings["eos_token"]) or "")
        return TokenizersVocabulary.clip(*files, ends, _by_name(_added(folder, settings))), settings
    raise TokenizerError(
        f"{folder}: vocab.json and merges.txt need tokenizer_class Qwen2Tokenizer or CLIPTokenizer, "
        f"tokenizer_config.json has {kind}; save the tokenizer as a tokenizer.json"
    )


def _added(folder: epath.Path, settings: Config) -> list[tuple[int | None, AddedToken]]:
    """Tokens added to the vocabulary file, with their ids if given: listed ones first, then special ones."""
    entries: list[tuple[int | None, AddedToken]] = []
    special = _special(settings)
    if "added_tokens_decoder" in settings:
        listed = sorted((int(index), value) for index, value in settings["added_tokens_decoder"].items())
        entries += [(index, _token(value, special=bool(value.get("special")))) for index, value in listed]
    else:
        names = {_name(value) for value in special}
        listed = sorted((index, name) for name, index in _json(folder / "added_tokens.json").items())
        entries += [(index, _token(name, special=name in names)) for index, name in listed]
    return entries + [(None, _token(value, special=True)) for value in special]


def _special(settings: Config) -> list[Any]:
    """Tokens with a role, and additional special ones, as the settings have them."""
    special = [value for key, value in settings.items() if key.endswith("_token") and _name(value)]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or []
        special += more.values() if isinstance(more, Mapping) else more
    return special


def _by_name(added: Iterable[tuple[int | None, AddedToken]]) -> dict[str, AddedToken]:
    """By name, in order; the first of a name is used."""
    found: dict[str, AddedToken] = {}
    for _, token in added:
        found.setdefault(token.content, token)
    return found


def _token(value: Any, special: bool) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    flags = {key: bool(value[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in value}
    return AddedToken(value["content"], special=special, **flags)


def _name(value: Any) -> str | None:
    """The text of a special token, which releases store as a string or with its flags."""
    return value.get("content") if isinstance(value, Mapping) else value if isinstance(value, str) else None


def _names(settings: Config) -> dict[str, str]:
    return {key: name for key, value in settings.items() if key.endswith("_token") and (name := _name(value))}


def _json(path: epath.Path) -> Fields:
    """The JSON object of a file; empty if it does not exist."""
    return read_released(path, TokenizerError) if path.exists() else {}

"""Vocabularies of releases: a `tokenizer.json`, a SentencePiece model, Qwen's tiktoken ranks."""

import base64
import codecs
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

import sentencepiece
import tiktoken
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from vlm_jax.processors.normal_form import composed

SPACE = "▁"  # SentencePiece's character for a space
# normalizer_spec.add_dummy_prefix = false, as a message to append: a later field overrides earlier ones.
NO_PREFIX = b"\x1a\x02\x18\x00"

# How the tokenizers of Qwen and Qwen2 split a text before they merge bytes.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
QWEN_VISUAL = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
EVERY_BYTE = "vlm_jax.every_byte"


def _every_byte(error: UnicodeError) -> tuple[str, int]:
    """One replacement character per invalid byte, as in SentencePiece; Python has one per sequence."""
    assert isinstance(error, UnicodeDecodeError)
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error(EVERY_BYTE, _every_byte)


@runtime_checkable
class Vocabulary(Protocol):
    """The vocabulary of one tokenizer file.

    Attributes:
      size: the largest id + 1, including added tokens.
      special: texts of the special tokens, by id.
    """

    size: int
    special: dict[int, str]

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Ids of a text; names of added tokens are encoded as these; with BOS and EOS if `add_special`."""
        ...

    def offsets(self, text: str, add_special: bool) -> list[tuple[int, int]] | None:
        """Character span [start, end) of every id of `encode`; None if unknown."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens by their names; ids without a token are omitted."""
        ...

    def id_of(self, token: str) -> int | None:
        """The id of one token; None if it does not exist."""
        ...


class TokenizersVocabulary:
    """A `tokenizers.Tokenizer`, with the tokens that the release adds."""

    def __init__(self, backend: tokenizers.Tokenizer, added: Mapping[str, AddedToken] | None = None):
        """Wraps `backend`; `added` tokens that it lacks get the next ids, in order."""
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        for name, token in (added or {}).items():
            if name not in known:
                backend.add_tokens([token])
        self.backend = backend
        entries = backend.get_added_tokens_decoder()
        self.special = {index: token.content for index, token in entries.items() if token.special}
        self.size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @classmethod
    def qwen2(cls, vocabulary: Mapping[str, int], merges: Sequence[str], added: Mapping[str, AddedToken]):
        """Qwen2's byte-level pairs from `vocab.json` and the lines of `merges.txt`."""
        pairs = [(left, right) for left, right in (line.split() for line in merges if line and line[:2] != "#v")]
        backend = tokenizers.Tokenizer(models.BPE(dict(vocabulary), pairs))
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        return cls(backend, added)

    @classmethod
    def clip(cls, vocabulary: Mapping[str, int], merges: Sequence[str], ends: tuple[str, str], added: Mapping):
        """CLIP's pairs of bytes from `vocab.json` and the lines of `merges.txt`.

        Args:
          vocabulary: ids by name.
          merges: lines of two names.
          ends: the start and end tokens.
          added: tokens added to the vocabulary.

        Source: openai/CLIP, clip/simple_tokenizer.py, without ftfy's repair of broken encodings; transformers,
        models/clip/tokenization_clip.py.
        """
        pairs = [(left, right) for left, right in (line.split() for line in merges if line and line[:2] != "#v")]
        first, last = ends
        unknown = {"unk_token": last, "end_of_word_suffix": "</w>", "continuing_subword_prefix": ""}
        backend = tokenizers.Tokenizer(models.BPE(dict(vocabulary), pairs, **unknown))
        spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        split = pre_tokenizers.Split(tokenizers.Regex(CLIP_PATTERN), behavior="removed", invert=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        backend.decoder = decoders.ByteLevel()
        ids = [(name, vocabulary[name]) for name in ends]
        backend.post_processor = processors.TemplateProcessing(f"{first} $A {last}", special_tokens=ids)
        return cls(backend, {**{name: AddedToken(name, special=True, normalized=False) for name in ends}, **added})

    def encode(self, text: str, add_special: bool) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def offsets(self, text: str, add_special: bool) -> list[tuple[int, int]] | None:
        return self.backend.encode(text, add_special_tokens=add_special).offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        return self.backend.token_to_id(token)


class SentencePieceVocabulary:
    """A SentencePiece model, used as in the slow tokenizers of Llama, LLaVA and InternLM2.

    Added tokens split a text, and the model encodes the parts between them. Its dummy prefix, an initial
    space, is added to every part (`legacy`), or only to the whole text.

    Attributes:
      edge_names: the model's names of the start and end tokens; None where it has none.
    """

    def __init__(
        self,
        model: bytes,
        added: Mapping[int, AddedToken],
        *,
        bos: int | None,
        eos: int | None,
        legacy: bool = True,
        listed: Collection[str] | None = None,
    ):
        """Reads a model.

        Args:
          model: content of a `tokenizer.model`.
          added: tokens that split a text first, by id; including those of the model.
          bos, eos: ids that `add_special` adds before and after a text; None for none.
          legacy: see above.
          listed: added tokens with a role or among the additional special ones; all added tokens when None.
        """
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)  # type: ignore[call-arg]
        self._inside = self._model if legacy else sentencepiece.SentencePieceProcessor(model_proto=model + NO_PREFIX)  # type: ignore[call-arg]
        self._legacy = legacy
        self._listed = {token.content for token in added.values()} if listed is None else listed
        self._added = {token.content: index for index, token in added.items()}
        self._names = {index: token.content for index, token in added.items()}
        self._edges = (bos, eos)
        self._prefixed = self._model.encode("a", out_type=str)[0].startswith(SPACE)
        self.special = {index: token.content for index, token in added.items() if token.special}
        self.size = max(self._model.get_piece_size(), *(index + 1 for index in added), 0)
        self.edge_names = (self._piece(self._model.bos_id()), self._piece(self._model.eos_id()))
        # The longest token that starts at a character is used.
        tokens = sorted(added.values(), key=lambda token: -len(token.content))
        patterns = [r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in tokens]
        self._cut = re.compile(f"({'|'.join(patterns)})") if patterns else None

    def encode(self, text: str, add_special: bool) -> list[int]:
        stretches = self._cut.split(text) if self._cut else [text]
        ids: list[int] = []
        for number, stretch in enumerate(stretches):
            if number % 2:
                token = self._added[stretch if stretch in self._added else stretch.strip()]
                # The whole text's initial space stays before an added token without a role.
                if number == 1 and not stretches[0] and not self._legacy and self._names[token] not in self._listed:
                    ids += [self._model.piece_to_id(SPACE)] * self._prefixed
                ids.append(token)
            elif stretch:
                ids += (self._inside if number else self._model).encode(stretch)
        bos, eos = self._edges if add_special else (None, None)
        return [*([] if bos is None else [bos]), *ids, *([] if eos is None else [eos])]

    def offsets(self, text: str, add_special: bool) -> list[tuple[int, int]] | None:
        return None

    def decode(self, ids: Sequence[int]) -> str:
        text, first = bytearray(), True
        for index in ids:
            if index in self._names:
                piece = self._names[index].encode()
            elif not 0 <= index < self._model.get_piece_size():
                continue
            elif self._model.is_byte(index):
                piece = bytes([int(self._model.id_to_piece(index)[1:-1], 16)])
            else:
                piece = self._model.id_to_piece(index).replace(SPACE, " ").encode()
            text += piece[1:] if first and self._prefixed and piece.startswith(b" ") else piece
            first = False
        return text.decode(errors=EVERY_BYTE)

    def _piece(self, index: int) -> str | None:
        return None if index < 0 else self._model.id_to_piece(index)

    def id_of(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        index = self._model.piece_to_id(token)
        return index if self._model.id_to_piece(index) == token else None


class TiktokenVocabulary:
    """Qwen v1's byte pairs and its special tokens, which follow the ranks.

    Source: QwenLM/Qwen-VL, tokenization_qwen.py, without the bytes of image paths.
    """

    def __init__(self, ranks: bytes, *, visual: bool):
        """Reads `ranks`, the content of a `qwen.tiktoken`; `visual` is for the tags of Qwen-VL."""
        lines = (line.split() for line in ranks.splitlines() if line)
        merges = {base64.b64decode(token): int(rank) for token, rank in lines}
        names = (*QWEN_SPECIAL, *(QWEN_VISUAL if visual else ()))
        special = dict(zip(names, itertools.count(len(merges)), strict=False))
        self._encoding = tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=merges, special_tokens=special)
        self.special = {index: name for name, index in special.items()}
        self.size = self._encoding.n_vocab

    def encode(self, text: str, add_special: bool) -> list[int]:
        del add_special  # it has no BOS and no EOS
        return self._encoding.encode(composed(text), allowed_special="all")

    def offsets(self, text: str, add_special: bool) -> list[tuple[int, int]] | None:
        return None

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([index for index in ids if 0 <= index < self.size], errors="replace")

    def id_of(self, token: str) -> int | None:
        try:
            return self._encoding.encode_single_token(token)
        except KeyError:
            return None

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one token."""
        return self._encoding.decode_single_token_bytes(index)

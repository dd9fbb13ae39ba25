"""Generated tokens as text: streaming, stop strings, and answers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from flax import linen as nn

from vlm_jax.generation.engine import Generated, generate
from vlm_jax.generation.sampling import GenerationError, Sampling
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import PADDING_SEGMENT, TEXT_SLOT, Batch, Params

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes an incomplete character to

# The row, and the text to append.
OnText = Callable[[int, str], None]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
      text: the answer up to the stop string, without end tokens.
      tokens: its ids, including the end token or the last one of the stop string.
      reason: why it ended: an end token, a stop string, or the limit of new tokens.
      visual_tokens: number of visual tokens in the prompt, in the first layers of the decoder and after each
        drop of visual tokens; empty without images.
    """

    text: str
    tokens: tuple[int, ...]
    reason: Literal["end", "stop", "length"]
    visual_tokens: tuple[int, ...] = ()


class TextStream:
    """Decodes tokens to text incrementally; characters and stop strings are never split.

    Attributes:
      text: the text so far, up to a stop string.
      stopped: whether a stop string occurred.
      length: number of tokens so far, up to the one that completed a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, skip_special: bool = True):
        """Starts with empty text.

        Args:
          tokenizer: decodes the tokens.
          stop: strings before which the text ends.
          skip_special: omits special tokens.
        """
        self.text, self.stopped, self.length = "", False, 0
        self._tokenizer, self._stop, self._skip = tokenizer, tuple(stop), skip_special
        # Tokens are decoded together with previous ones, since a space may depend on them.
        self._before: list[int] = []
        self._unspelled: list[int] = []
        self._spelled = 0  # characters of both that are in the text
        self._told = 0

    def push(self, ids: Sequence[int]) -> str:
        """Appends tokens and returns the new text that is final."""
        for index in ids:
            if self.stopped:
                break
            self.length += 1
            if not (self._skip and index in self._tokenizer.special_ids):
                self._unspelled.append(index)
                self._spell(last=False)
        return self._tell(len(self.text) if self.stopped else len(self.text) - self._held())

    def finish(self) -> str:
        """Returns the remaining text after the last token."""
        if not self.stopped:
            self._spell(last=True)
        return self._tell(len(self.text))

    def _spell(self, last: bool) -> None:
        together = self._decode([*self._before, *self._unspelled])
        whole = together if last else together.rstrip(UNFINISHED)
        fresh = whole[self._spelled :]
        self._spelled += len(fresh)
        if whole == together:
            self._before = self._unspelled if fresh else [*self._before, *self._unspelled]
            self._unspelled, self._spelled = [], len(self._decode(self._before))
        # A stop string that ended earlier would have been found earlier.
        start = max(0, len(self.text) - max(map(len, self._stop), default=0))
        self.text += fresh
        found = [place for string in self._stop if (place := self.text.find(string, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held(self) -> int:
        """Number of characters at the end that may begin a stop string."""
        lengths = [size for string in self._stop for size in range(1, len(string)) if self.text.endswith(string[:size])]
        return max(lengths, default=0)

    def _tell(self, end: int) -> str:
        end, start = max(end, self._told), self._told
        self._told = end
        return self.text[start:end]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)


def check_strings(given: object, name: str) -> None:
    """Raises a `GenerationError` unless given a list of strings; a string would be read letter by letter."""
    if isinstance(given, str):
        raise GenerationError(f"{name}: expected a list of strings, got the string {given!r}; pass [{given!r}]")
    if not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
        raise GenerationError(f"{name}: expected a list of strings, got {given!r}")


def check_function(given: object, name: str) -> None:
    """Raises a `GenerationError` unless given a function or None."""
    if given is not None and not callable(given):
        raise GenerationError(f"{name}: expected a function, got {given!r}")


def complete(
    model: nn.Module,
    params: Params,
    batch: Batch,
    tokenizer: Tokenizer,
    *,
    end_ids: Sequence[int],
    stop: Sequence[str] = (),
    on_text: OnText | None = None,
    skip_special: bool = True,
    **options: Any,
) -> list[Completion]:
    """Answers to the prompts of a batch.

    Args:
      model, params, batch, end_ids: as `engine.generate`.
      tokenizer: decodes the answers.
      stop: strings before which an answer ends. The host searches for them between chunks; one that is a special
        token ends its row on the device, like `end_ids`.
      on_text: called with each piece of text as it is generated; the pieces of a row form its answer.
      skip_special: omits special tokens from the text.
      **options: further arguments of `engine.generate`.

    Raises:
      GenerationError: an empty stop string, a string instead of a list, or as `engine.generate`.
    """
    check_strings(stop, "stop")
    check_function(on_text, "on_text")
    if not isinstance(options.get("sampling", Sampling()), Sampling):
        raise GenerationError(f"sampling: expected Sampling(…), got {options['sampling']!r}")
    if "" in stop:
        raise GenerationError("stop: expected non-empty strings, got ''; it would end every answer immediately")
    named = {string: tokenizer.vocabulary.id_of(string) for string in stop}
    stop_ids = {index for index in named.values() if index in tokenizer.special_ids}
    ends = {*end_ids, *stop_ids}
    spelled = [string for string, index in named.items() if index not in stop_ids]
    streams = [TextStream(tokenizer, spelled, skip_special=skip_special) for _ in range(len(batch.tokens))]

    def tell(row: int, text: str) -> None:
        if on_text is not None and text:
            on_text(row, text)

    def watch(new: np.ndarray, counts: np.ndarray) -> np.ndarray:
        for row, (stream, ids, count) in enumerate(zip(streams, new.tolist(), counts, strict=True)):
            tell(row, stream.push([index for index in ids[:count] if index not in ends]))
        return np.asarray([stream.stopped for stream in streams])

    options = {"pad_id": tokenizer.pad_id or 0, **options}
    generated = generate(model, params, batch, end_ids=sorted(ends), watch=watch, **options)
    answers = []
    for row, stream in enumerate(streams):
        tell(row, stream.finish())
        length = stream.length if stream.stopped else generated.lengths[row]
        ids = tuple(generated.tokens[row, :length].tolist())
        stopped = stream.stopped or ids[-1] in stop_ids.difference(end_ids)
        reason = "stop" if stopped else "end" if ids[-1] in ends else "length"
        answers.append(Completion(stream.text, ids, reason, _visual_tokens(batch, row, generated)))
    return answers


def _visual_tokens(batch: Batch, row: int, generated: Generated) -> tuple[int, ...]:
    """Number of visual tokens of a prompt in each span of layers, from the positions in its cache."""
    if batch.images is None or generated.prompt_lengths is None:
        return ()
    segments, shown = np.asarray(batch.segment_ids[row]), np.asarray(batch.visual_index[row])
    num_text = int(np.count_nonzero((segments != PADDING_SEGMENT) & (shown == TEXT_SLOT)))
    return tuple((generated.prompt_lengths[row] - num_text).tolist())

"""Generated tokens as text: streaming, stop strings, and answers."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import numpy as np
from flax import linen as nn

from vlm_jax.generation.engine import generate
from vlm_jax.generation.sampling import GenerationError, Sampling
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import PADDING_SEGMENT, TEXT_SLOT, Batch, Params

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes an incomplete character to

Reason = Literal["end", "stop", "length", "left"]

# The row, and the text to append.
OnText = Callable[[int, str], None]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
      text: the answer up to the stop string, without end tokens.
      tokens: its ids, including the end token or the last one of the stop string.
      reason: why it ended: an end token, a stop string, the limit of new tokens, or the row left the batch.
      visual_tokens: number of visual tokens in the prompt, in the first layers of the decoder and after each
        drop of visual tokens; empty without images.
    """

    text: str
    tokens: tuple[int, ...]
    reason: Reason
    visual_tokens: tuple[int, ...] = ()


# The row, and its answer.
OnAnswer = Callable[[int, Completion], None]


def _stays() -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """Settings of one row of a batch.

    Attributes:
      max_new_tokens: maximum tokens of its answer, at most that of the batch; None for that of the batch.
      stop: strings before which it ends, in addition to those of the batch.
      leaves: called between chunks; the row ends with the tokens that it has when it returns True.
    """

    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    leaves: Callable[[], bool] = _stays


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


class _Answer:
    """The answer of one row while its tokens arrive.

    Attributes:
      tokens: its ids so far.
      reason: why it ended; None before its end.
      stop_ids: special tokens among its stop strings; the text omits them, so they are found by their ids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_ids: Collection[int],
        stop: Sequence[str],
        settings: RowSettings,
        skip_special: bool,
    ):
        named = {string: tokenizer.vocabulary.id_of(string) for string in (*stop, *settings.stop)}
        self.tokens: list[int] = []
        self.reason: Reason | None = None
        self.stop_ids = {index for index in named.values() if index in tokenizer.special_ids}
        self._ends, self._settings = frozenset(end_ids), settings
        spelled = [string for string, index in named.items() if index not in self.stop_ids]
        self._stream = TextStream(tokenizer, spelled, skip_special=skip_special)

    @property
    def text(self) -> str:
        """The text so far, up to a stop string."""
        return self._stream.text

    def push(self, ids: Sequence[int]) -> str:
        """Appends tokens, up to the end of the answer, and returns the new text that is final."""
        text = []
        for index in ids:
            if self.reason is not None:
                break
            self.tokens.append(index)
            text.append(self._read(index))
            if self.reason is None and len(self.tokens) == self._settings.max_new_tokens:
                self.reason = "length"
        if self.reason is None and self._settings.leaves():
            self.reason = "left"
        return "".join(text)

    def finish(self, reason: Reason) -> str:
        """Ends the answer, by `reason` if it has no end yet, and returns the remaining text."""
        self.reason = self.reason or reason
        return self._stream.finish()

    def _read(self, index: int) -> str:
        if index in self._ends:
            self.reason = "end"
        elif index in self.stop_ids:
            self.reason = "stop"
        else:
            text = self._stream.push([index])
            if self._stream.stopped:
                self.reason = "stop"
            return text
        return ""


def complete(
    model: nn.Module,
    params: Params,
    batch: Batch,
    tokenizer: Tokenizer,
    *,
    end_ids: Sequence[int],
    stop: Sequence[str] = (),
    settings: Sequence[RowSettings] | None = None,
    on_text: OnText | None = None,
    on_answer: OnAnswer | None = None,
    on_nan: Callable[[int, GenerationError], None] | None = None,
    skip_special: bool = True,
    **options: Any,
) -> list[Completion]:
    """Answers to the prompts of a batch.

    Args:
      model, params, batch, end_ids: as `engine.generate`.
      tokenizer: decodes the answers.
      stop: strings before which an answer ends. The host searches for them between chunks; one that is a special
        token ends its row on the device, like `end_ids`.
      settings: settings of each row; the host checks them between chunks.
      on_text: called with each piece of text as it is generated; the pieces of a row form its answer.
      on_answer: called with each answer as soon as it is complete, while others go on.
      on_nan: called with a row whose logits are NaN, which then leaves while the others go on; when None, that is an
        error.
      skip_special: omits special tokens from the text.
      **options: further arguments of `engine.generate`.

    Raises:
      GenerationError: an empty stop string, a string instead of a list, or as `engine.generate`.
    """
    check_function(on_text, "on_text")
    check_sampling(options.get("sampling", Sampling()))
    size = len(batch.tokens)
    settings = [RowSettings()] * size if settings is None else settings
    if len(settings) != size:
        raise GenerationError(f"settings: expected one for each of the {size} rows of the batch, got {len(settings)}")
    for strings in (stop, *(one.stop for one in settings)):
        check_strings(strings, "stop")
        if "" in strings:
            raise GenerationError("stop: expected non-empty strings, got ''; it would end every answer immediately")
    of_all = _Answer(tokenizer, end_ids, stop, RowSettings(), skip_special).stop_ids
    answers = [_Answer(tokenizer, end_ids, stop, one, skip_special) for one in settings]
    prompts: list[np.ndarray] = []
    completions: list[Completion | None] = [None] * size

    def tell(row: int, text: str) -> None:
        if on_text is not None and text:
            on_text(row, text)

    def end(row: int, reason: Reason) -> None:
        answer = answers[row]
        tell(row, answer.finish(reason))
        assert answer.reason is not None
        visual = _visual_tokens(batch, row, prompts)
        completions[row] = completion = Completion(answer.text, tuple(answer.tokens), answer.reason, visual)
        if on_answer is not None:
            on_answer(row, completion)

    def watch(new: np.ndarray, counts: np.ndarray) -> np.ndarray:
        for row, (answer, ids, count) in enumerate(zip(answers, new.tolist(), counts, strict=True)):
            if answer.reason is None:
                tell(row, answer.push(ids[:count]))
                if answer.reason is not None:
                    end(row, answer.reason)
        return np.asarray([answer.reason is not None for answer in answers])

    def leave(row: int, error: GenerationError) -> None:
        assert on_nan is not None
        on_nan(row, error)
        end(row, "left")

    if on_nan is not None:
        options["on_nan"] = leave
    options = {"pad_id": tokenizer.pad_id or 0, "on_prompts": prompts.append, **options}
    generate(model, params, batch, end_ids=sorted({*end_ids, *of_all}), watch=watch, **options)
    for row, completion in enumerate(completions):
        if completion is None:
            end(row, "length")
    return [completion for completion in completions if completion is not None]


def check_sampling(given: object) -> None:
    """Raises a `GenerationError` unless given a Sampling, or a list of them."""
    listed = isinstance(given, Sequence) and all(isinstance(one, Sampling) for one in given)
    if not listed and not isinstance(given, Sampling):
        raise GenerationError(f"sampling: expected Sampling(…), got {given!r}")


def _visual_tokens(batch: Batch, row: int, prompts: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Number of visual tokens of a prompt in each span of layers, from the positions in its cache."""
    if batch.images is None or not prompts:
        return ()
    segments, shown = np.asarray(batch.segment_ids[row]), np.asarray(batch.visual_index[row])
    num_text = int(np.count_nonzero((segments != PADDING_SEGMENT) & (shown == TEXT_SLOT)))
    return tuple((prompts[0][row] - num_text).tolist())

"""What fine-tuning code of releases learns of a conversation, with its faults; for `targets="as_released"`.

The code of most releases counts tokens of parts of the text, and takes the sums for places in the ids. Where they are
off, it learns nothing of a sample, or other tokens. Each class here counts as one release does.

Not built, because a conversation is refused that the release goes on with:
  - InternVL and LLaVA with another number of tags than pictures, and InternVL's tag that it writes into the first turn;
  - labels on the places of a picture: a tag in an answer, in LLaVA, LLaVA-NeXT and Qwen-VL;
  - truncation to a maximum length: a conversation is never cut.
Not built either: LLaVA-NeXT's loss of a first turn that is an answer, and Qwen's older data_qwen.py, since no file of a
folder tells which code it was trained with.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.learned import ASSISTANT, PromptError
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Config, Message

IMAGE = "<image>"
Ids = Sequence[int | None]  # None at the place of an image


@runtime_checkable
class Released(Protocol):
    """Text and labels of a release's code."""

    def text(self, template: ChatTemplate, messages: Sequence[Message], variables: Config) -> str:
        """The text that it writes for messages, each content one text with the marks of images.

        Raises:
          PromptError: it refuses the messages.
        """
        ...

    def learned(self, tokenizer: Tokenizer, text: str, ids: Ids) -> list[bool]:
        """Whether it learns each of the ids of a text."""
        ...


@dataclasses.dataclass(frozen=True)
class Qwen25VL:
    """Labels start two ids behind the word `assistant`, wherever it is, until the end token and one id behind it.

    Source: QwenLM/Qwen3-VL, qwen-vl-finetune, qwenvl/data/data_processor.py, preprocess_qwen_visual.
    """

    def text(self, template: ChatTemplate, messages: Sequence[Message], variables: Config) -> str:
        """All turns but questions are answers, a system message too."""
        asked = [m if m["role"] == "user" else {**m, "role": "assistant"} for m in messages]
        return template.render(asked, **variables)

    def learned(self, tokenizer: Tokenizer, text: str, ids: Ids) -> list[bool]:
        """See `Released`."""
        word, end = tokenizer.encode("assistant")[-1], tokenizer.id_of("<|im_end|>")
        found, place = [False] * len(ids), 0
        while place < len(ids):
            if ids[place] == word:
                start = stop = place + 2
                while stop < len(ids) and ids[stop] != end:
                    stop += 1
                if stop < len(ids):
                    found[start : stop + 2] = [True] * len(found[start : stop + 2])
                    place = stop
            place += 1
        return found


@dataclasses.dataclass(frozen=True)
class Vicuna:
    """Rounds that `</s>` ends, each with one `ASSISTANT: `; else nothing is learned.

    Attributes:
      limit: the release's maximum length; counts are not checked from there on.
      later: tokens to subtract in every round but the first, as LLaVA does with a tokenizer that is not legacy.

    Source: LLaVA, llava/train/train.py, preprocess_v1 and preprocess_multimodal; MobileVLM, mobilevlm/train/train.py.
    """

    limit: int | None
    later: int = 0

    def text(self, template: ChatTemplate, messages: Sequence[Message], variables: Config) -> str:
        """See `Released`."""
        written = _opening(template, "USER: ")
        for number, message in enumerate(_alternating(messages)):
            own, head = _image_first(message["content"]), ("USER:", "ASSISTANT:")[number % 2]
            written += f"{head} {own}{'</s>' if number % 2 else ' '}" if own else head
        return written

    def learned(self, tokenizer: Tokenizer, text: str, ids: Ids) -> list[bool]:
        """See `Released`."""
        return _rounds(tokenizer, text.split("</s>"), " ASSISTANT: ", ids, 2, self.later, self.limit)


@dataclasses.dataclass(frozen=True)
class Llama2:
    """Rounds that `</s>` ends, each with one `[/INST] `.

    Attributes:
      limit: see `Vicuna`.

    Source: LLaVA, llava/train/train.py, preprocess_llama_2, and llava/conversation.py.
    """

    limit: int | None

    def text(self, template: ChatTemplate, messages: Sequence[Message], variables: Config) -> str:
        """See `Released`."""
        written = ""
        for number, message in enumerate(_alternating(messages)):
            own = _image_first(message["content"])
            if number % 2:
                written += f" {own} </s>" if own else ""
            elif own or not number:
                written += f"{'<s>[INST] ' if number else _opening(template, '')}{own} [/INST]"
        return written

    def learned(self, tokenizer: Tokenizer, text: str, ids: Ids) -> list[bool]:
        """See `Released`."""
        return _rounds(tokenizer, text.split("</s>"), "[/INST] ", ids, 2, 0, self.limit)


@dataclasses.dataclass(frozen=True)
class Plain:
    """One image and an answer, without the question.

    Source: LLaVA, llava/train/train.py, preprocess_plain.
    """

    def text(self, template: ChatTemplate, messages: Sequence[Message], variables: Config) -> str:
        """See `Released`."""
        if len(messages) != 2 or IMAGE not in messages[0]["content"]:
            raise PromptError("as released, a conversation has a question with an image, and an answer")
        return IMAGE + _image_first(messages[1]["content"]) + "\n"

    def learned(self, tokenizer: Tokenizer, text: str, ids: Ids) -> list[bool]:
        """See `Released`."""
        return [number >= _count(tokenizer, IMAGE) for number in range(len(ids))]


@dataclasses.dataclass(frozen=True)
class ChatML:
    """Turns that an end token ends, in pairs of a question and an answer.

    Attributes:
      heads: of a question and of an answer.
      end: end token.
      limit: see `Vicuna`.
      ended: tokens that a pair has behind what is counted.
      later: tokens to subtract in every pair but the first; -1 for LLaVA with a legacy tokenizer.
      start: whether a start token comes first, which is counted with the first question.
      llava: a turn's image comes first, and is one token of a question that is not counted.
      never: a token that is not learned anywhere.

    Source: OpenGVLab/InternVL, internvl/train/dataset.py, preprocess_mpt and preprocess_phi3; LLaVA,
    llava/train/train.py, preprocess_mpt.
    """

    heads: tuple[str, str] = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    end: str = "<|im_end|>"
    limit: int | None = None
    ended: int = 1
    later: int = 0
    start: bool = False
    llava: bool = False
    never: str | None = None

    def text(self, template: ChatTemplate, messages: Sequence[Message], variables: Config) -> str:
        """See `Released`."""
        own = [{**m, "content": _image_first(m["content"])} for m in messages] if self.llava else messages
        return _chat(template, own, self.heads, self.end)

    def learned(self, tokenizer: Tokenizer, text: str, ids: Ids) -> list[bool]:
        """See `Released`."""
        parts = text.split(self.end)
        pairs = [parts[:3], *(parts[place : place + 2] for place in range(3, len(parts), 2))]
        skipped = self.llava + self.start
        found = _rounds(
            tokenizer,
            [self.end.join(pair) for pair in pairs],
            self.end + self.heads[1],
            ids,
            skipped,
            self.later,
            self.limit,
            ended=self.ended,
            start=int(self.start),
        )
        never = None if self.never is None else tokenizer.vocabulary.id_of(self.never)
        return [own and (never is None or index != never) for own, index in zip(found, ids, strict=True)]


@dataclasses.dataclass(frozen=True)
class InternLM2:
    """Parts between the heads of answers; a last question is learned. All turns are stripped.

    Source: OpenGVLab/InternVL, internvl/train/dataset.py, preprocess_internlm.
    """

    heads = ("<|im_start|>user\n", "<|im_start|>assistant\n")

    def text(self, template: ChatTemplate, messages: Sequence[Message], variables: Config) -> str:
        """See `Released`."""
        stripped = [{**message, "content": message["content"].strip()} for message in messages]
        return _chat(template, stripped, self.heads, "<|im_end|>")

    def learned(self, tokenizer: Tokenizer, text: str, ids: Ids) -> list[bool]:
        """See `Released`."""

        def count(part: str) -> int:
            return len(tokenizer.encode(part, add_special=True)) - 1

        parts = text.split(self.heads[1])
        found, place = [True] * len(ids), 1 + count(parts[0] + self.heads[1])
        found[:place] = [False] * len(found[:place])
        for part in parts[1:-1]:
            answer, *asked = part.split(self.heads[0])
            if len(asked) != 1:
                raise PromptError(f"as released, a part with {len(asked)} questions is refused: {part!r}")
            place += count(answer)
            size = count(self.heads[0] + asked[0] + self.heads[1])
            found[place : place + size] = [False] * len(found[place : place + size])
            place += size
        return _checked(tokenizer, found, place + count(parts[-1]), ids, None)


# `template` of InternVL's config -> its labels; those of `internvl2_5` have no such fault.
INTERNVL: Mapping[str, Callable[[], Released]] = {
    "Hermes-2": ChatML,
    "internlm2-chat": InternLM2,
    "phi3-chat": lambda: ChatML(
        ("<|user|>\n", "<|assistant|>\n"), "<|end|>", ended=0, later=1, start=True, never="<|endoftext|>"
    ),
}


def _alternating(messages: Sequence[Message]) -> list[Message]:
    """Questions and answers in turn, without a first answer.

    Raises:
      PromptError: other roles, or two of one role in a row.
    """
    own = list(messages[1:] if messages and messages[0]["role"] in ASSISTANT else messages)
    for number, message in enumerate(own):
        wanted = "assistant" if number % 2 else "user"
        if message["role"] != wanted:
            raise PromptError(
                f"as released, questions and answers alternate: expected the role '{wanted}', got '{message['role']}'"
            )
    return own


def _opening(template: ChatTemplate, head: str) -> str:
    """The text before the first question."""
    mark = "vlm_jax.question"
    shown = template.render([{"role": "user", "content": mark}], add_generation_prompt=False)
    if head + mark not in shown:
        raise PromptError(f"{template.origin}: as released, a question is written after {head!r}")
    return shown[: shown.index(head + mark)]


def _image_first(text: str) -> str:
    """A text with one tag at its start for all of its tags."""
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip() if IMAGE in text else text


def _chat(template: ChatTemplate, messages: Sequence[Message], heads: tuple[str, str], end: str) -> str:
    """Turns of a head, a text and an end token, which an empty text lacks."""
    written = _opening(template, heads[0])
    for number, message in enumerate(_alternating(messages)):
        written += heads[number % 2] + (message["content"] + end if message["content"] else "")
    return written


def _count(tokenizer: Tokenizer, text: str) -> int:
    """Number of ids of a text, with one for each image and the start token once."""
    parts = [tokenizer.encode(part, add_special=True) for part in text.split(IMAGE)]
    begins = bool(parts[0]) and parts[0][0] == tokenizer.bos_id
    return sum(map(len, parts)) + (len(parts) - 1) * (1 - int(begins))


def _rounds(
    tokenizer: Tokenizer,
    rounds: Sequence[str],
    separator: str,
    ids: Ids,
    skipped: int,
    later: int,
    limit: int | None,
    *,
    ended: int = 0,
    start: int = 1,
) -> list[bool]:
    """Labels of rounds, each with one separator before its answer.

    Args:
      tokenizer: counts.
      rounds: texts; nothing behind one with another number of separators is learned.
      separator: the end of a question.
      ids: of the whole text.
      skipped: tokens of a separated question that do not count.
      later: tokens to subtract in every round but the first.
      limit: of the check of counts.
      ended: tokens that a round has behind its text.
      start: tokens before the first round.
    """
    found, place = [True] * len(ids), start
    found[:start] = [False] * len(found[:start])
    for number, part in enumerate(rounds):
        halves = part.split(separator)
        if not part or len(halves) != 2:
            break
        less = later * (number > 0)
        stop = place + _count(tokenizer, halves[0] + separator) - skipped - less
        found[place:stop] = [False] * len(found[place:stop])
        place += _count(tokenizer, part) + ended - less
    return _checked(tokenizer, found, place, ids, limit)


def _checked(tokenizer: Tokenizer, found: list[bool], place: int, ids: Ids, limit: int | None) -> list[bool]:
    """Nothing behind the counted tokens, and nothing at all where the count is off."""
    padding = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.unknown_id
    total = sum(index != padding for index in ids)
    if place != total and (limit is None or place < limit):
        return [False] * len(ids)
    return [own and number < place for number, own in enumerate(found)]

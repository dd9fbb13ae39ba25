"""Prompts of releases without a chat template that encode turns separately: DeepSeek-VL2 and -OCR, Qwen-VL."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_jax.processors.items import Kind, check_kinds, check_message_keys
from vlm_jax.processors.layout import Text
from vlm_jax.processors.learned import (
    AS_RELEASED,
    ASSISTANT,
    USER,
    PromptError,
    Targets,
    Turns,
    answer_weights,
    without_weights,
)
from vlm_jax.processors.list_format import PICTURE, from_list_format, tagged_parts
from vlm_jax.processors.prompt import Slot
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Grid, Message, Params


@dataclasses.dataclass(frozen=True)
class DeepSeekVL2Prompt:
    """`<|User|>: question` and `<|Assistant|>:answer`, each encoded separately.

    The release displays conversations with other spaces; the ids are those of its training.

    Attributes:
      tokenizer: of the release.
      image: the tag of an image in a text.

    Source: DeepSeek-VL2, processing_deepseek_vl_v2.py, format_messages_v2.
    """

    tokenizer: Tokenizer
    image: str = "<image>"

    independent_turns = False

    @property
    def placeholders(self) -> Mapping[Kind, tuple[str, ...]]:
        """See `Prompt`."""
        return {"image": (self.image,)}

    def __call__(
        self,
        messages: Sequence[Message],
        places: Sequence[Sequence[float]],
        *,
        add_generation_prompt: bool = True,
        targets: Targets = False,
        turns: Turns = "all",
        continuation: str = "",
        grids: Sequence[Grid | None] = (),
        frame_grids: Sequence[Grid | None] = (),
        durations: Sequence[float] = (),
        **variables: object,
    ) -> list[Text | Slot]:
        """The pieces of one conversation; see `Prompt`. Every question ends with the head of its answer.

        An answer at the end of a prompt lacks its end token: the model writes on from there.
        """
        del grids, frame_grids, durations  # not written
        _refuse(messages, places, variables)
        weights = answer_weights(messages, turns)
        pieces: list[Text | Slot] = [Text([_present(self.tokenizer.bos_id, "bos", self.tokenizer)])]
        for number, message in enumerate(messages):
            text = flat(message.get("content"), lambda _: self.image, "\n").strip()
            last = number == len(messages) - 1
            if message["role"] in USER:
                question = f"<|User|>: {text}\n\n" if text else "<|User|>:"
                # As released, also a last question that is not answered.
                answered = add_generation_prompt or not last or targets == AS_RELEASED
                pieces += self.spelled(f"{question}<|Assistant|>:" if answered else question.rstrip())
            elif message["role"] in ASSISTANT:
                end = _present(self.tokenizer.eos_id, "eos", self.tokenizer)
                weight = weights[number] if targets else 0.0
                pieces += self.spelled(text, weight)
                pieces += [] if last and add_generation_prompt and not targets else [Text([end], weight)]
            elif number or message["role"] != "system":
                raise PromptError(
                    f"message {number} has the role '{message['role']}'; expected user or assistant, and system "
                    "only in the first"
                )
            else:
                pieces += self.spelled(text)
        return pieces + (self.spelled(continuation, 1.0) if continuation else [])

    def spelled(self, text: str, learned: float | bool = 0.0) -> list[Text | Slot]:
        """Encodes the text between images separately, without the tokenizer's special tokens."""
        return _split_at(self.image, text, self.tokenizer, learned)


@dataclasses.dataclass(frozen=True)
class UnmarkedPrompt:
    """Questions and answers one after another, without names of the roles; text between images is encoded separately.

    Attributes:
      tokenizer: of the release.
      image: the tag of an image in a text.
      strips: whether white space around each message is removed.

    Source: DeepSeek-OCR, modeling_deepseekocr.py, infer, and conversation.py, the template `plain`.
    """

    tokenizer: Tokenizer
    image: str = "<image>"
    strips: bool = True

    independent_turns = False

    @property
    def placeholders(self) -> Mapping[Kind, tuple[str, ...]]:
        """See `Prompt`."""
        return {"image": (self.image,)}

    def __call__(
        self,
        messages: Sequence[Message],
        places: Sequence[Sequence[float]],
        *,
        add_generation_prompt: bool = True,
        targets: Targets = False,
        turns: Turns = "all",
        continuation: str = "",
        grids: Sequence[Grid | None] = (),
        frame_grids: Sequence[Grid | None] = (),
        durations: Sequence[float] = (),
        **variables: object,
    ) -> list[Text | Slot]:
        """The pieces of one conversation; see `Prompt`. An answer at the end of a prompt lacks its end token."""
        del grids, frame_grids, durations  # not written
        _refuse(messages, places, variables)
        weights = answer_weights(messages, turns)
        pieces: list[Text | Slot] = [Text([_present(self.tokenizer.bos_id, "bos", self.tokenizer)])]
        for number, message in enumerate(messages):
            text = flat(message.get("content"), lambda _: self.image, "\n")
            text = text.strip() if self.strips else text
            if message["role"] not in ASSISTANT:
                pieces += _split_at(self.image, text, self.tokenizer)
                continue
            weight = weights[number] if targets else 0.0
            pieces += _split_at(self.image, text, self.tokenizer, weight)
            if targets or not add_generation_prompt or number < len(messages) - 1:
                pieces.append(Text([_present(self.tokenizer.eos_id, "eos", self.tokenizer)], weight))
        return pieces + (_split_at(self.image, continuation, self.tokenizer, 1.0) if continuation else [])


def _split_at(tag: str, text: str, tokenizer: Tokenizer, learned: float | bool = 0.0) -> list[Text | Slot]:
    """A text with a slot for each tag of an image; what is between them is encoded separately, as plain text."""
    pieces: list[Text | Slot] = []
    for number, part in enumerate(text.split(tag)):
        pieces += [Slot("image", tokenizer.id_of(tag))] if number else []
        pieces.append(Text(tokenizer.encode(part), learned))
    return pieces


@dataclasses.dataclass(frozen=True)
class QwenVLPrompt:
    """ChatML with separately encoded parts, and the path of an image in the first of its positions.

    Attributes:
      tokenizer: of the release.
      system: the default system message.
      picture: text before an image, with its number in its message.

    Source: Bai et al. 2023 (Qwen-VL), section 3.1; QwenLM/Qwen-VL-Chat, qwen_generation_utils.py, make_context, and
    tokenization_qwen.py.
    """

    tokenizer: Tokenizer
    system: str = "You are a helpful assistant."
    picture: str = PICTURE

    independent_turns = False

    @property
    def placeholders(self) -> Mapping[Kind, tuple[str, ...]]:
        """See `Prompt`."""
        return {"image": ("<img>",)}

    def __call__(
        self,
        messages: Sequence[Message],
        places: Sequence[Sequence[float]],
        *,
        add_generation_prompt: bool = True,
        targets: Targets = False,
        turns: Turns = "all",
        continuation: str = "",
        grids: Sequence[Grid | None] = (),
        frame_grids: Sequence[Grid | None] = (),
        durations: Sequence[float] = (),
        **variables: object,
    ) -> list[Text | Slot]:
        """The pieces of one conversation; see `Prompt`.

        In training the tags of every turn are learned too, and the last turn ends with a newline, as in the release.
        """
        del grids, frame_grids, durations  # not written
        _refuse(messages, places, variables)
        weights, messages = answer_weights(messages, turns), without_weights(messages)
        if targets == AS_RELEASED and messages and messages[0]["role"] == "assistant":
            weights, messages = weights[1:], messages[1:]  # which finetune.py drops
        if not messages or messages[0]["role"] != "system":
            weights, messages = [0.0, *weights], [{"role": "system", "content": self.system}, *messages]
        start, end, newline = "<|im_start|>", "<|im_end|>", "\n"
        pieces: list[Text | Slot] = []
        for number, message in enumerate(messages):
            answer = weights[number] if targets else 0.0
            tag = answer if message["role"] == "assistant" else float(bool(targets) and turns == "all")
            pieces += [*self.spelled(start, tag), *self.spelled(message["role"]), *self.spelled(newline)]
            pieces += [*self.spelled(self.content(message.get("content")), answer), *self.spelled(end, tag)]
            if targets or add_generation_prompt or number < len(messages) - 1:
                pieces += self.spelled(newline, tag)
        if add_generation_prompt:
            pieces += [*self.spelled(start), *self.spelled("assistant"), *self.spelled(newline)]
        return pieces + self.spelled(continuation, 1.0)

    def content(self, content: Any) -> str:
        """A message's content as one text, with `<img>path</img>` for an image; an empty path where it has none."""
        if content is None or isinstance(content, str):
            return content or ""
        items = [{"text": item["text"]} if item["type"] == "text" else {"image": _path(item)} for item in content]
        return from_list_format(items, self.picture)

    def spelled(self, text: str, learned: float | bool = 0.0) -> list[Text | Slot]:
        """Encodes a text with its images; the bytes of a path are the ids 0 to 255 of the vocabulary's bytes.

        Raises:
          PromptError: an image's tag is not closed.
        """
        pieces: list[Text | Slot] = []
        tokens = [self.tokenizer.id_of(token) for token in ("<img>", "</img>", "<imgpad>")]
        end = 0
        for image in tagged_parts(text, ("img",)):
            pieces += self._plain(text[end : image.start], learned)
            path = tuple(image.content.encode())
            pieces += [Text([tokens[0]]), Slot("image", tokens[2], path), Text([tokens[1]])]
            end = image.end
        return pieces + self._plain(text[end:], learned)

    def _plain(self, part: str, learned: float | bool) -> list[Text | Slot]:
        if "<img>" in part:
            raise PromptError(f"an <img> without </img> in the text {part!r}")
        return [Text(self.tokenizer.encode(part), learned)] if part else []


def flat(content: Any, tag: Callable[[Message], str], joint: str) -> str:
    """A message's content as one text.

    Args:
      content: a text, or a list of items.
      tag: text for an item that is not text.
      joint: separator between items.
    """
    if content is None or isinstance(content, str):
        return content or ""
    return joint.join(item["text"] if item["type"] == "text" else tag(item) for item in content)


def _path(item: Message) -> str:
    return item["image"] if isinstance(item.get("image"), str) else ""


def _refuse(messages: Sequence[Message], places: Sequence[Sequence[float]], variables: Params) -> None:
    check_kinds(messages, ("image",))
    check_message_keys(messages)
    if places or variables:
        told = ", ".join(variables) or f"{len(places)} videos"
        raise PromptError(f"expected only images and text, got {told}")


def _present(index: int | None, role: str, tokenizer: Tokenizer) -> int:
    if index is None:
        raise PromptError(f"{tokenizer.origin}: its conversations need a {role} token, but it has none")
    return index

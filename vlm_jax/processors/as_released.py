"""What fine-tuning code of releases learns of a conversation, with its faults; for `targets="as_released"`.

The code of most releases counts tokens of parts of the text, and takes the sums for places in the ids. Where they are
off, it learns nothing of a sample, or other tokens. Each function here counts as one release does.

Not built, because a conversation is refused that the release goes on with:
  - InternVL and LLaVA with another number of tags than pictures, and InternVL's tag that it writes into the first turn;
  - labels on the places of a picture: a tag in an answer, in LLaVA and Qwen-VL;
  - truncation to a maximum length: a conversation is never cut.
Qwen's older data_qwen.py is not built either: no file of a folder tells which code it was trained with.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.learned import ASSISTANT, PromptError
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Config, Message

IMAGE = "<image>"
Ids = Sequence[int | None]  # None at the place of an image


@dataclasses.dataclass(frozen=True)
class Released:
    """A release's labels.

    Attributes:
      text: the text that its code writes for messages, each content one text with the marks of images.
      learned: whether it learns each id: of a tokenizer, a text, and the text's ids.
    """

    text: Callable[[ChatTemplate, Sequence[Message], Config], str]
    learned: Callable[[Tokenizer, str, Ids], list[bool]]


def qwen2_5_vl() -> Released:
    """Labels start two ids behind the word `assistant`, wherever it is, until the end token and one id behind it.

    Source: QwenLM/Qwen3-VL, qwen-vl-finetune, qwenvl/data/data_processor.py, preprocess_qwen_visual.
    """

    def text(template: ChatTemplate, messages: Sequence[Message], variables: Config) -> str:
        asked = [m if m["role"] == "user" else {**m, "role": "assistant"} for m in messages]
        return template.render(asked, **variables)

    def learned(tokenizer: Tokenizer, text: str, ids: Ids) -> list[bool]:
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

    return Released(text, learned)


def vicuna(*, legacy: bool, corrected: bool, limit: int | None) -> Released:
    """Rounds that `</s>` ends, each with one `ASSISTANT: `; else nothing is learned.

    Args:
      legacy: whether the tokenizer is legacy; else LLaVA subtracts one token in every round but the first.
      corrected: whether the release does so; MobileVLM does not.
      limit: the release's maximum length; counts are not checked from there on.

    Source: LLaVA, llava/train/train.py, preprocess_v1 and preprocess_multimodal; MobileVLM, mobilevlm/train/train.py.
    """
    separator, end = " ASSISTANT: ", "</s>"

    def text(template: ChatTemplate, messages: Sequence[Message], variables: Config) -> str:
        before, written = _opening(template, "USER: "), ""
        for number, message in enumerate(_alternating(messages)):
            own = _image_first(message["content"])
            head = "ASSISTANT:" if number % 2 else "USER:"
            written += f"{head} {own}{end if number % 2 else ' '}" if own else head
        return before + written

    less = int(corrected and not legacy)
    return Released(text, _rounds(separator, end, 2, lambda number: less * (number > 0), limit))


def llama2(*, limit: int | None) -> Released:
    """Rounds that `</s>` ends, each with one `[/INST] `.

    Source: LLaVA, llava/train/train.py, preprocess_llama_2, and llava/conversation.py.
    """

    def text(template: ChatTemplate, messages: Sequence[Message], variables: Config) -> str:
        before, written = _opening(template, ""), ""
        for number, message in enumerate(_alternating(messages)):
            own = _image_first(message["content"])
            if number % 2:
                written += f" {own} </s>" if own else ""
            elif own or not number:
                written += f"{'<s>[INST] ' if number else before}{own} [/INST]"
        return written

    return Released(text, _rounds("[/INST] ", "</s>", 2, lambda number: 0, limit))


def mpt(*, legacy: bool, limit: int | None) -> Released:
    """Turns that `<|im_end|>` ends, in pairs, counted without that token unless the tokenizer adds a start token.

    Source: LLaVA, llava/train/train.py, preprocess_mpt.
    """
    end, heads = "<|im_end|>", ("<|im_start|>user\n", "<|im_start|>assistant\n")

    def learned(tokenizer: Tokenizer, text: str, ids: Ids) -> list[bool]:
        found, place = [True] * len(ids), 0
        for number, part in enumerate(_pairs(text, end)):
            halves = part.split(end + heads[1])
            if not part or len(halves) != 2:
                break
            more = int(number > 0 and legacy)
            asked = _count_between(tokenizer, halves[0] + end + heads[1]) - 1 + more
            found[place : place + asked] = [False] * len(found[place : place + max(asked, 0)])
            place += _count_between(tokenizer, part) + more
        return _checked(tokenizer, found, place, ids, limit)

    return Released(_chat(heads, end, images_first=True), learned)


def hermes2() -> Released:
    """Turns that `<|im_end|>` ends, in pairs.

    Source: OpenGVLab/InternVL, internvl/train/dataset.py, preprocess_mpt.
    """
    end, heads = "<|im_end|>", ("<|im_start|>user\n", "<|im_start|>assistant\n")

    def learned(tokenizer: Tokenizer, text: str, ids: Ids) -> list[bool]:
        found, place = [True] * len(ids), 0
        for part in _pairs(text, end):
            halves = part.split(end + heads[1])
            if not part or len(halves) != 2:
                break
            asked = len(tokenizer.encode(halves[0] + end + heads[1], add_special=True))
            found[place : place + asked] = [False] * len(found[place : place + asked])
            place += len(tokenizer.encode(part, add_special=True)) + 1
        return _checked(tokenizer, found, place, ids)

    return Released(_chat(heads, end), learned)


def internlm2() -> Released:
    """Parts between the heads of answers; a last question is learned. All turns are stripped.

    Source: OpenGVLab/InternVL, internvl/train/dataset.py, preprocess_internlm.
    """
    end, heads = "<|im_end|>", ("<|im_start|>user\n", "<|im_start|>assistant\n")

    def learned(tokenizer: Tokenizer, text: str, ids: Ids) -> list[bool]:
        def count(part: str) -> int:
            return len(tokenizer.encode(part, add_special=True)) - 1

        found, place = [True] * len(ids), 1 + count(text.split(heads[1])[0] + heads[1])
        found[:place] = [False] * len(found[:place])
        parts = text.split(heads[1])
        for part in parts[1:-1]:
            answer, *asked = part.split(heads[0])
            if len(asked) != 1:
                raise PromptError(f"as released, a part with {len(asked)} questions is refused: {part!r}")
            place += count(answer)
            size = count(heads[0] + asked[0] + heads[1])
            found[place : place + size] = [False] * len(found[place : place + size])
            place += size
        return _checked(tokenizer, found, place + count(parts[-1]), ids)

    return Released(_chat(heads, end, stripped=True), learned)


def phi3() -> Released:
    """Turns that `<|end|>` ends, in pairs.

    Source: OpenGVLab/InternVL, internvl/train/dataset.py, preprocess_phi3.
    """
    end, heads = "<|end|>", ("<|user|>\n", "<|assistant|>\n")

    def learned(tokenizer: Tokenizer, text: str, ids: Ids) -> list[bool]:
        never = tokenizer.vocabulary.id_of("<|endoftext|>")
        found, place = [index != never for index in ids], 1
        found[:1] = [False]
        for number, part in enumerate(_pairs(text, end)):
            halves = part.split(end + heads[1])
            if not part or len(halves) != 2:
                break
            later = int(number > 0)
            asked = len(tokenizer.encode(halves[0] + end + heads[1], add_special=True)) - 1 - later
            found[place : place + asked] = [False] * len(found[place : place + asked])
            place += len(tokenizer.encode(part, add_special=True)) - later
        return _checked(tokenizer, found, place, ids)

    return Released(_chat(heads, end), learned)


INTERNVL: Mapping[str, Callable[[], Released]] = {
    "Hermes-2": hermes2,
    "internlm2-chat": internlm2,
    "phi3-chat": phi3,
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


def _chat(heads: tuple[str, str], end: str, stripped: bool = False, images_first: bool = False) -> Callable[..., str]:
    """Turns of a head, a text and an end token, which an empty text lacks."""

    def text(template: ChatTemplate, messages: Sequence[Message], variables: Config) -> str:
        written = _opening(template, heads[0])
        for number, message in enumerate(_alternating(messages)):
            own = message["content"].strip() if stripped else message["content"]
            own = _image_first(own) if images_first else own
            written += heads[number % 2] + (own + end if own else "")
        return written

    return text


def _pairs(text: str, end: str) -> list[str]:
    """The opening with the first question and answer, and each further question with its answer."""
    parts = text.split(end)
    return [end.join(parts[:3]), *(end.join(parts[place : place + 2]) for place in range(3, len(parts), 2))]


def _rounds(
    separator: str, end: str, head: int, less: Callable[[int], int], limit: int | None
) -> Callable[[Tokenizer, str, Ids], list[bool]]:
    """Labels of parts that `end` ends, each with one separator before its answer.

    Args:
      separator, end: texts.
      head: tokens of a separated question that do not count.
      less: number of the part -> tokens to subtract.
      limit: of the check of counts.
    """

    def learned(tokenizer: Tokenizer, text: str, ids: Ids) -> list[bool]:
        found, place = [True] * len(ids), 1
        found[:1] = [False]
        for number, part in enumerate(text.split(end)):
            halves = part.split(separator)
            if not part or len(halves) != 2:
                break
            asked = _count_between(tokenizer, halves[0] + separator) - head - less(number)
            found[place : place + asked] = [False] * len(found[place : place + asked])
            place += _count_between(tokenizer, part) - less(number)
        return _checked(tokenizer, found, place, ids, limit)

    return learned


def _count_between(tokenizer: Tokenizer, text: str) -> int:
    """Number of ids of a text, with one for each image and the start token once."""
    parts = [tokenizer.encode(part, add_special=True) for part in text.split(IMAGE)]
    begins = bool(parts[0]) and parts[0][0] == tokenizer.bos_id
    return sum(map(len, parts)) + (len(parts) - 1) * (1 - int(begins))


def _checked(
    tokenizer: Tokenizer, found: list[bool], place: int, ids: Ids, limit: int | None = None
) -> list[bool]:
    """Nothing behind the counted tokens, and nothing at all where the count is off."""
    padding = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.unknown_id
    total = sum(index != padding for index in ids)
    if place != total and (limit is None or place < limit):
        return [False] * len(ids)
    return [own and number < place for number, own in enumerate(found)]

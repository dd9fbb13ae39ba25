"""What training learns of a conversation: answers with their end tokens, as weighted spans of text and of ids."""

import dataclasses
import math
import re
import secrets
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

from vlm_jax.processors.chat import GENERATION_BEGIN, GENERATION_END, ChatTemplate, ChatTemplateError, Message
from vlm_jax.processors.layout import Text
from vlm_jax.processors.tokenizer import Tokenizer, TokenizerError
from vlm_jax.types import Config

AS_RELEASED = "as_released"
Targets = bool | str  # a string is AS_RELEASED, and Turns "all" or "last"; others are refused by their values
Turns = str
USER = ("user", "<|User|>")
ASSISTANT = ("assistant", "<|Assistant|>")


class PromptError(ValueError):
    """Messages that a release's conversation format does not allow; the message names the cause."""


class Span(NamedTuple):
    """Characters [start, stop) of a text, and the loss weight of its tokens."""

    start: int
    stop: int
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Learned:
    """What a release's fine-tuning code learns of a conversation, besides the answers.

    Attributes:
      end: text after an answer that is learned wherever the template writes it; elsewhere, the end token that the
        template writes, without white space after it.
      tokens: tokens that are learned in every turn.
      head: learns the head of an answer, such as `assistant` and a newline.
      crossing: learns a token that begins in an answer's head and ends in the answer, such as one of two newlines.
      drops_rest: the text ends with a last answer, without what the template writes after it.
      questions: whether training has the texts of questions, or only their images.
      images_first: in training the images of a turn are at its start, before a newline and the stripped text: "always";
        "single" where a turn has one image, which is elsewhere; "never".
    """

    end: str | None = None
    tokens: tuple[str, ...] = ()
    head: bool = False
    crossing: bool = True
    drops_rest: bool = False
    questions: bool = True
    images_first: Literal["always", "single", "never"] = "never"


def answer_weights(messages: Sequence[Message], turns: Turns = "all") -> list[float]:
    """The loss weight of every message; 0 for those that are not an assistant's.

    Args:
      messages: an assistant's may have `loss`, whether it is learned, and `weight`, a factor of at least 0; these take
        precedence over `turns`.
      turns: "all" for every answer, "last" for the last one only.

    Raises:
      PromptError: another value, or a message of another role that should be learned.
    """
    if turns not in ("all", "last"):
        raise PromptError(f"turns: expected 'all' or 'last', got {turns!r}")
    answers = [number for number, message in enumerate(messages) if message.get("role") in ASSISTANT]
    weights = [0.0] * len(messages)
    for number, message in enumerate(messages):
        loss, weight = message.get("loss"), message.get("weight")
        if loss is not None and not isinstance(loss, bool):
            raise PromptError(f"message {number}: loss: expected true or false, got {loss!r}")
        known = isinstance(weight, int | float) and not isinstance(weight, bool)
        if weight is not None and not (known and math.isfinite(weight) and weight >= 0):
            raise PromptError(f"message {number}: weight: expected a finite number of at least 0, got {weight!r}")
        if number in answers:
            default = 1.0 if turns == "all" or number == answers[-1] or loss or weight is not None else 0.0
            weights[number] = 0.0 if loss is False else default if weight is None else float(weight)
        elif loss or weight:
            raise PromptError(
                f"message {number}: {'loss' if loss else 'weight'}: only an assistant's message is learned, and this "
                f"one has the role {message.get('role')!r}; remove the key"
            )
    return weights


def without_weights(messages: Sequence[Message]) -> list[Message]:
    """The messages without the keys of `answer_weights`."""
    return [{key: value for key, value in message.items() if key not in ("loss", "weight")} for message in messages]


def render_learned(
    template: ChatTemplate,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    learned: Learned = Learned(),
    turns: Turns = "all",
    **variables: Any,
) -> tuple[str, list[Span]]:
    """The text of a conversation, and its trained spans.

    These are the contents of the template's `{% generation %}` blocks with an end token directly after them. Without
    blocks they are the text that an assistant's message adds after the generation prompt, without white space after its
    end token. If the template writes no end token after a last answer, the text ends with one in place of white space
    that the template writes after the answer.

    Args:
      template: renders the conversation.
      messages: see `ChatTemplate.render` and `answer_weights`.
      tokenizer: provides the tokens that end an answer.
      learned: what is learned besides answers.
      turns: see `answer_weights`.
      **variables: further variables of the template, including `add_generation_prompt`.

    Raises:
      ChatTemplateError: an answer cannot be found in what a template without blocks writes.
      PromptError: see `answer_weights`.

    Source: transformers, `apply_chat_template` with `return_assistant_tokens_mask`, for the blocks.
    """
    weights = answer_weights(messages, turns)  # a template may read `loss`
    ends = tuple({*tokenizer.names.values(), *tokenizer.vocabulary.special.values()})
    if template.marks_learned:
        text, spans = _blocks(template, messages, weights, **variables)
        end = tokenizer.names.get("eos_token")
        if end:
            spans = [
                span._replace(stop=span.stop + len(end)) if text.startswith(end, span.stop) else span for span in spans
            ]
    else:
        text, spans = _answers(template, messages, weights, ends, learned, **variables)
    if spans and messages[-1].get("role") in ASSISTANT and not variables.get("add_generation_prompt"):
        text, spans[-1] = _ended(text, spans[-1], messages[-1], ends, learned, tokenizer)
        text = text[: spans[-1].stop] if learned.drops_rest else text
    return text, [span for span in spans if span.weight]


def _blocks(
    template: ChatTemplate, messages: Sequence[Message], weights: Sequence[float], **variables: Any
) -> tuple[str, list[Span]]:
    """The text, and its blocks."""
    begin, end = (f"<{secrets.token_hex(16)}>" for _ in range(2))
    marked = {**variables, GENERATION_BEGIN: begin, GENERATION_END: end}
    text, spans = "", []
    for number, part in enumerate(re.split(f"{begin}|{end}", template.render(messages, **marked))):
        spans += [Span(len(text), len(text) + len(part))] if number % 2 else []
        text += part
    if set(weights) <= {0.0, 1.0} and sum(weights) == sum(message.get("role") in ASSISTANT for message in messages):
        return text, spans
    before = 0
    for number, weight in enumerate(weights):  # a message may have several blocks
        until = template.render(messages[: number + 1], **{**marked, "add_generation_prompt": False}).count(begin)
        spans[before:until] = [span._replace(weight=weight) for span in spans[before:until]]
        before = until
    return text, spans


def _answers(
    template: ChatTemplate,
    messages: Sequence[Message],
    weights: Sequence[float],
    ends: tuple[str, ...],
    learned: Learned,
    **variables: Any,
) -> tuple[str, list[Span]]:
    """The text, and what each assistant's message adds after the generation prompt."""
    text, spans = template.render(messages, **variables), []
    for number, message in enumerate(messages):
        if message.get("role") not in ASSISTANT:
            continue
        head, through = _around(template, messages, number, text, variables)
        stripped = through.rstrip()
        stop = len(stripped) if stripped.endswith(ends) else len(through)
        end = learned.end
        if end and stripped.endswith(end.rstrip()) and text.startswith(end, len(stripped) - len(end.rstrip())):
            stop = len(stripped) - len(end.rstrip()) + len(end)
        start = _head(template, messages[: number + 1], through, variables, prompted=False) if learned.head else head
        spans.append(Span(len(start), stop, weights[number]))
    return text, spans


def _around(
    template: ChatTemplate, messages: Sequence[Message], number: int, text: str, variables: Config
) -> tuple[str, str]:
    """The text before an answer with its head, and the text through its end.

    Some templates write an answer differently if a question follows: those of models that think leave out its thought.
    Its place is then found by a mark instead of its content.
    """
    alone = {**variables, "add_generation_prompt": False}
    through = template.render(messages[: number + 1], **alone)
    head = _head(template, messages[: number + 1], through, variables, prompted=True)
    if text.startswith(through) and through.startswith(head):
        return head, through
    mark = secrets.token_hex(8)
    marked = [{**message, "content": mark} if n == number else message for n, message in enumerate(messages)]
    before, found, after = template.render(marked, **variables).partition(mark)
    end = template.render(marked[: number + 1], **alone).partition(mark)[2]
    stop = len(text) - len(after)
    around = len(before) <= stop and text.startswith(before) and text.endswith(after)
    if not (found and around and after.startswith(end)):
        raise ChatTemplateError(
            f"{template.origin}: message {number}: cannot find its trained text, because it is rendered differently "
            "if more messages follow, or without the generation prompt; put {% generation %} and {% endgeneration %} "
            "around the assistant's text in the template"
        )
    return head if before.startswith(head) else before, text[: stop + len(end)]


def _head(
    template: ChatTemplate, messages: Sequence[Message], through: str, variables: Config, *, prompted: bool
) -> str:
    """The text before the last message, which is an answer, with its head or without."""
    if len(messages) > 1:
        return template.render(messages[:-1], **{**variables, "add_generation_prompt": prompted})
    if not prompted:
        return ""
    mark, options = secrets.token_hex(8), {**variables, "add_generation_prompt": False}
    before = through[: max(template.render([{**messages[0], "content": mark}], **options).find(mark), 0)]
    asked = [{"role": "user", "content": mark}]
    head = template.render(asked, **{**variables, "add_generation_prompt": True}).removeprefix(
        template.render(asked, **options)
    )
    return before[: before.rfind(head) + len(head)] if head in before else before


def _ended(
    text: str, span: Span, message: Message, ends: tuple[str, ...], learned: Learned, tokenizer: Tokenizer
) -> tuple[str, Span]:
    """The text with an end token after its last answer, and the answer's span with it."""
    if learned.end and text[: span.stop].endswith(learned.end):
        return text, span
    end = tokenizer.names.get("eos_token")
    if end is None or text.rstrip().endswith(ends):
        return text, span
    content = message.get("content")
    parts = [content] if isinstance(content, str) else [item.get("text", "") for item in content or ()]
    own = parts[-1] if parts else ""
    place = text.rfind(own, span.start) if own else -1
    if place >= 0 and not text[place + len(own) :].strip():
        text = text[: place + len(own)]
    return text + end, span._replace(stop=len(text) + len(end))


def clipped_spans(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The parts of spans inside text[start:stop], as spans of that text."""
    clipped = [Span(max(first, start) - start, min(last, stop) - start, weight) for first, last, weight in spans]
    return [span for span in clipped if span.start < span.stop]


def encode_learned(
    tokenizer: Tokenizer,
    text: str,
    spans: Sequence[Span],
    *,
    add_special: bool,
    learned: Learned = Learned(),
) -> tuple[list[int], list[float]]:
    """Ids of a text, and the loss weight of each: that of the span that it overlaps, else 0.

    Args:
      tokenizer: encodes it by `Tokenizer.encode`.
      text: any text.
      spans: of the text.
      add_special: see `Tokenizer.encode`.
      learned: provides `crossing`.

    Raises:
      TokenizerError: a token crosses an end of a span, in a vocabulary without character offsets.
    """
    ids = tokenizer.encode(text, add_special=add_special)
    weights = [0.0] * len(ids)
    offsets = tokenizer.vocabulary.offsets(text, add_special) if spans else None
    for start, stop, weight in spans:
        if offsets is None:
            first = _num_before(tokenizer, text, ids, start, add_special, exact=learned.crossing)
            behind = _num_before(tokenizer, text, ids, stop, add_special)
        else:
            inside = [number for number, (begin, end) in enumerate(offsets) if end > start and begin < stop]
            if not learned.crossing:
                inside = [number for number in inside if offsets[number][0] >= start]
            first, behind = (inside[0], inside[-1] + 1) if inside else (0, 0)
        weights[first:behind] = [weight] * (behind - first)
    return ids, weights


def _num_before(
    tokenizer: Tokenizer, text: str, ids: Sequence[int], place: int, add_special: bool, *, exact: bool = True
) -> int:
    """Number of ids of the text before a character index; if not `exact`, a token across it is among them."""
    before = tokenizer.encode(text[:place], add_special=add_special)
    if not exact and before[:-1] == ids[: len(before) - 1]:
        return len(before)
    if before != ids[: len(before)]:
        raise TokenizerError(
            f"{tokenizer.origin}: a token crosses the start or end of trained text, at {text[:place][-20:]!r} | "
            f"{text[place:][:20]!r}; make the chat template write a space or a special token there"
        )
    return len(before)


def texts(ids: Sequence[int], weights: Sequence[float]) -> Iterator[Text]:
    """Runs of ids with equal weights."""
    for weight, run in groupby(zip(ids, weights, strict=True), key=lambda pair: pair[1]):
        yield Text([index for index, _ in run], weight)

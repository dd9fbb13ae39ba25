"""The trained parts of a conversation: assistants' answers with their end tokens, as spans of text and ids."""

import re
import secrets
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from vlm_jax.processors.chat import GENERATION_BEGIN, GENERATION_END, ChatTemplate, ChatTemplateError, Message
from vlm_jax.processors.layout import Text
from vlm_jax.processors.tokenizer import Tokenizer, TokenizerError

Span = tuple[int, int]  # character span [start, end) of a text


def render_learned(
    template: ChatTemplate, messages: Sequence[Message], tokenizer: Tokenizer, **variables: Any
) -> tuple[str, list[Span]]:
    """The text of a conversation, and its trained spans.

    These are the contents of the template's `{% generation %}` blocks. Without blocks they are the text that an
    assistant's message adds after the generation prompt, without white space after its end token.

    Args:
      template: renders the conversation.
      messages: see `ChatTemplate.render`.
      tokenizer: provides the tokens that end an answer.
      **variables: further variables of the template, including `add_generation_prompt`.

    Raises:
      ChatTemplateError: a template without blocks renders an answer differently if more messages follow, or without
      the generation prompt.

    Source: transformers, `apply_chat_template` with `return_assistant_tokens_mask`, for the blocks.
    """
    if template.marks_learned:
        begin, end = (f"<{secrets.token_hex(16)}>" for _ in range(2))
        marked = template.render(messages, **{**variables, GENERATION_BEGIN: begin, GENERATION_END: end})
        text, spans = "", []
        for number, part in enumerate(re.split(f"{begin}|{end}", marked)):
            spans += [(len(text), len(text) + len(part))] if number % 2 else []
            text += part
        return text, spans
    text, spans = template.render(messages, **variables), []
    ends = tuple({*tokenizer.names.values(), *tokenizer.vocabulary.special.values()})
    for number, message in enumerate(messages):
        if message.get("role") == "assistant":
            head = template.render(messages[:number], **{**variables, "add_generation_prompt": True})
            through = template.render(messages[: number + 1], **{**variables, "add_generation_prompt": False})
            if not (text.startswith(through) and through.startswith(head)):
                raise ChatTemplateError(
                    f"{template.origin}: message {number}: cannot find its trained text, because it is rendered "
                    "differently if more messages follow, or without the generation prompt; put {% generation %} and "
                    "{% endgeneration %} around the assistant's text in the template"
                )
            bare = through.rstrip()
            spans.append((len(head), len(bare if bare.endswith(ends) else through)))
    return text, spans


def clipped_spans(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The parts of spans inside text[start:stop], as spans of that text."""
    clipped = [(max(first, start) - start, min(last, stop) - start) for first, last in spans]
    return [(first, last) for first, last in clipped if first < last]


def encode_learned(
    tokenizer: Tokenizer, text: str, spans: Sequence[Span], *, add_special: bool
) -> tuple[list[int], list[bool]]:
    """Ids of a text, and whether each overlaps a span.

    Args:
      tokenizer: encodes it by `Tokenizer.encode`.
      text: any text.
      spans: of the text.
      add_special: see `Tokenizer.encode`.

    Raises:
      TokenizerError: a token crosses an end of a span, in a vocabulary without character offsets.
    """
    ids = tokenizer.encode(text, add_special=add_special)
    learned = [False] * len(ids)
    offsets = tokenizer.vocabulary.offsets(text, add_special) if spans else None
    for start, stop in spans:
        if offsets is None:
            first, behind = (_num_before(tokenizer, text, ids, place, add_special) for place in (start, stop))
        else:
            inside = [number for number, (begin, end) in enumerate(offsets) if end > start and begin < stop]
            first, behind = (inside[0], inside[-1] + 1) if inside else (0, 0)
        learned[first:behind] = [True] * (behind - first)
    return ids, learned


def _num_before(tokenizer: Tokenizer, text: str, ids: Sequence[int], place: int, add_special: bool) -> int:
    """Number of ids of the text before a character index."""
    before = tokenizer.encode(text[:place], add_special=add_special)
    if before != ids[: len(before)]:
        raise TokenizerError(
            f"{tokenizer.origin}: a token crosses the start or end of trained text, at {text[:place][-20:]!r} | "
            f"{text[place:][:20]!r}; make the chat template write a space or a special token there"
        )
    return len(before)


def texts(ids: Sequence[int], learned: Sequence[bool]) -> Iterator[Text]:
    """Runs of ids with equal `learned`."""
    for is_learned, run in groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1]):
        yield Text([index for index, _ in run], is_learned)

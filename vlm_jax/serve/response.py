"""Answers in the form of OpenAI's interface."""

import dataclasses
import json
import time
import uuid
from collections.abc import Sequence

from vlm_jax.generation.text import Completion
from vlm_jax.processors.processor import Example
from vlm_jax.types import Fields

REASONS = {"end": "stop", "stop": "stop", "length": "length"}
DONE = b"data: [DONE]\n\n"


def model_object(name: str, created: int) -> Fields:
    """The description of a served model."""
    return {"id": name, "object": "model", "created": created, "owned_by": "vlm_jax"}


def usage(example: Example, completions: Sequence[Completion]) -> Fields:
    """Counts of tokens.

    `prompt_tokens` include the visual tokens; `visual_tokens` are those of `Completion`: in the first layers of the
    decoder, and after each drop.
    """
    prompt, new = example.load.length, sum(len(one.tokens) for one in completions)
    visual = completions[0].visual_tokens if completions else ()
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "visual_tokens": list(visual),
    }


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to one request.

    Attributes:
      model: name of the model.
      id, created: an identifier, and the time in seconds since 1970.
    """

    model: str
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, example: Example, completions: Sequence[Completion]) -> Fields:
        """The response with all choices."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": None,
                "finish_reason": REASONS[one.reason],
            }
            for index, one in enumerate(completions)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(example, completions)}

    def piece(self, choice: int, delta: Fields, completion: Completion | None = None) -> bytes:
        """An event with a part of one choice, or with its end."""
        reason = None if completion is None else REASONS[completion.reason]
        part = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({**self._head("chat.completion.chunk"), "choices": [part]})

    def last(self, example: Example, completions: Sequence[Completion]) -> bytes:
        """The event with the usage, after all choices."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(example, completions)})

    def _head(self, kind: str) -> Fields:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(content: Fields) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()

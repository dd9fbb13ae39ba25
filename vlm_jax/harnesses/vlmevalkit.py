"""A model of VLMEvalKit: `supported_VLM["NAME"] = partial(VlmJax, pretrained=DIR, token_budget=64)`."""

import itertools
from collections.abc import Sequence
from typing import Any

from vlmeval.vlm.base import BaseModel  # type: ignore

from vlm_jax.harnesses.model import READ, HarnessModel
from vlm_jax.processors.learned import PromptError
from vlm_jax.types import Config, Fields


class VlmJax(BaseModel):
    """A release with a token budget; VLMEvalKit asks one question at a time."""

    INSTALL_REQ = False
    INTERLEAVE = True
    allowed_types = ["text", "image", "video"]  # noqa: RUF012 (as of the base class)

    def __init__(self, **arguments: Any):
        """Loads the release.

        Args:
          **arguments: the fields of `harnesses.model.ModelSettings`, and generation settings: those of
            `HarnessModel.answer_settings`.

        Raises:
          ConfigError, GenerationError: an argument that is not read.
          Others as `vlm_jax.from_pretrained`.
        """
        super().__init__()
        given = {name: arguments[name] for name in READ if name in arguments}
        self.model = HarnessModel({name: value for name, value in arguments.items() if name not in given})
        self._settings = self.model.answer_settings(given)

    def generate_inner(self, message: Sequence[Config], dataset: str | None = None) -> str:
        """The answer to a question.

        Args:
          message: items `{"type": "text" | "image" | "video", "value": text or path}`; a role in an item, such as
            "system", is that of its message, "user" by default.
          dataset: not read.

        Raises:
          PromptError: an item with another key.
        """
        grouped = itertools.groupby(message, lambda item: item.get("role", "user"))
        return self._answer([{"role": role, "content": [_item(item) for item in items]} for role, items in grouped])

    def chat_inner(self, message: Sequence[Config], dataset: str | None = None) -> str:
        """The answer to the last question of a conversation, of messages with a role and items as of a question."""
        content = [[_item(item) for item in one["content"]] for one in message]
        return self._answer([{"role": m["role"], "content": c} for m, c in zip(message, content, strict=True)])

    def _answer(self, messages: list[Fields]) -> str:
        (answer,) = self.model.answers([(lambda: messages, self._settings)])
        return answer.text


def _item(item: Config) -> Fields:
    unread = [key for key in item if key not in ("type", "value", "role")]
    if unread:
        raise PromptError(f"the key '{unread[0]}' of an item of VLMEvalKit is not read; remove it")
    return {"type": item["type"], item["type"]: item["value"]}

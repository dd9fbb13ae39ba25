"""Prompts without a chat template: a start token, images, questions, and answers with their end token."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from vlm_jax.processors.items import Kind, check_message_keys
from vlm_jax.processors.layout import Text
from vlm_jax.processors.learned import PromptError, Targets, Turns, answer_weights
from vlm_jax.processors.prompt import Slot
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Grid, Message

# Number of texts whose ids are cached: questions and short answers repeat during a run.
CACHED_TEXTS = 1 << 16


class UnknownText(ValueError):
    """A text that the vocabulary cannot encode; the message has the text and the word."""


@dataclasses.dataclass(frozen=True)
class PlainPrompt:
    """Encodes `<bos> images context question answer <eos> question answer <eos> ...`.

    Everything before the last text of the first user message is context.

    Attributes:
      tokenizer: with the names `bos_token`, `eos_token` and `image_token`, the placeholder of visual tokens.
      independent_turns: turns do not attend to each other, and each has the positions directly after the context,
        so that one encoded image serves many questions. A prompt for generation is nevertheless one branch.
        Source: Deitke et al. 2024 (Molmo), section 3, multi-annotated images.

    Raises:
      TokenizerError: the tokenizer lacks one of these names.
    """

    tokenizer: Tokenizer
    independent_turns: bool = False

    @property
    def placeholders(self) -> Mapping[Kind, tuple[str, ...]]:
        """The image token, which texts of data files must not contain; see `Prompt`."""
        mark = self.tokenizer.names.get("image_token")
        return {"image": () if mark is None else (mark,), "video": ()}

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

        Raises:
          PromptError: no question, or any variables.
          UnknownText: a word that the vocabulary lacks, or the name of a special token.
        """
        del add_generation_prompt, grids, frame_grids, durations  # not written
        check_message_keys(messages)
        if variables:
            raise PromptError(f"without a chat template, {', '.join(variables)} are unused; leave them out")
        if not any(message["role"] == "user" for message in messages):
            raise PromptError("expected at least one user message, got none")
        names = self.tokenizer.names
        bos, eos, image = (self.tokenizer.id_of(names.get(f"{role}_token", role)) for role in ("bos", "eos", "image"))
        remaining, turn, independent = iter(places), 0, self.independent_turns and bool(targets)
        weights = answer_weights(messages, turns)
        pieces: list[Text | Slot] = [Text([bos])]
        for number, message in enumerate(messages):
            content = message["content"]
            items = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            if message["role"] == "assistant":
                branch = turn if independent else 0
                weight = weights[number] if targets else 0.0
                pieces += [Text([*self._ids(item["text"]), eos], weight, branch) for item in items]
                continue
            last = max((number for number, item in enumerate(items) if item["type"] == "text"), default=-1)
            turn += message["role"] == "user"
            for number, item in enumerate(items):
                if item["type"] == "text":
                    asked = message["role"] == "user" and number == last
                    branch = turn if asked and independent else 0
                    pieces.append(Text(self._ids(item["text"]), branch=branch))
                else:
                    count = len(next(remaining, (0.0,))) if item["type"] == "video" else 1
                    kind: Kind = "video" if item["type"] == "video" else "image"
                    pieces += [Slot(kind, image)] * count
        return pieces + ([Text(self._ids(continuation), 1.0)] if continuation else [])

    def _ids(self, text: str) -> tuple[int, ...]:
        return _known_ids(self.tokenizer, text)


@functools.lru_cache(CACHED_TEXTS)
def _known_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The ids of a text without special and unknown tokens."""
    ids = tokenizer.encode(text)
    refused = tokenizer.special_ids
    if not refused.isdisjoint(ids):
        spans = tokenizer.vocabulary.offsets(text, False) or [(0, len(text))] * len(ids)
        place, (start, stop) = next((i, span) for i, span in zip(ids, spans, strict=True) if i in refused)
        if place == tokenizer.unknown_id:
            raise UnknownText(f"the vocabulary has no '{text[start:stop]}', in the text '{text}'")
        name = tokenizer.decode([place], skip_special=False)
        raise UnknownText(f"the special token {name} is not allowed in a text, got '{text}'")
    return tuple(ids)

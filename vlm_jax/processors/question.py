"""The question of each image, as segments for a text tower, for reducers that choose by it."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from vlm_jax.processors.items import Kind, media_items, texts_of
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.processors.learned import PromptError
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Message, Question

Segments = Int[np.ndarray, "_ length"]


@dataclasses.dataclass(frozen=True)
class QuestionTexts:
    """Converts the question of each image of a conversation to ids.

    Attributes:
      tokenizer: of the text tower; adds its start and end tokens.
      length: positions of the text tower; a longer question is cut into segments of this length, each without start
        and end tokens of its own, as CDPruner released it.
      which: the `first` text of the user in an image's own message or after it (before it where none follows), or the
        `last` text of the conversation.
      table_rows: number of tokens in the tower's table.
      segments: the most segments of a question in a row of a static shape.
    """

    tokenizer: Tokenizer
    length: int
    which: Literal["first", "last"]
    table_rows: int
    segments: int = 1

    def __call__(
        self,
        messages: Sequence[Message],
        placeholders: Collection[str],
        pictures: Sequence[int],
        name: str,
        learned: Sequence[int] = (),
    ) -> list[Segments]:
        """The segments of each picture's question, the last one filled with zeros, which follow its end token.

        Args:
          messages: of the conversation.
          placeholders: what stands for pictures in their texts.
          pictures: number of the message that each picture is in.
          name: of the conversation, for errors.
          learned: numbers of the messages that are learned.

        Raises:
          PromptError: a question comes after a learned answer, which must not depend on it.
          TokenizerError: a token of the text for which the tower has no row.
        """
        questions = questions_of(messages, placeholders)
        chosen = [self.chosen(questions, own) for own in pictures]
        for own, number in zip(pictures, chosen, strict=True):
            for answer in learned:
                if number is not None and own < answer < number:
                    raise PromptError(
                        f"{name}: the answer of message {answer} is learned from tokens that a later question, of "
                        f"message {number}, chooses; set turns to 'last', or question of the reducer to 'first'"
                    )
        texts: dict[int | None, str] = {None: "", **questions}
        made = {number: self._segments(texts[number], name) for number in dict.fromkeys(chosen)}
        return [made[number] for number in chosen]

    def chosen(self, questions: Mapping[int, str], picture: int) -> int | None:
        """The number of the question, of several, for a picture in a message; None without a question."""
        numbers = list(questions)
        after = [number for number in numbers if number >= picture] if self.which == "first" else []
        return next(iter(after), numbers[-1] if numbers else None)

    def _segments(self, text: str, name: str) -> Segments:
        ids = self.tokenizer.encode(text, add_special=True)
        self.tokenizer.check_rows(ids, self.table_rows, f"{name}, question")
        segments = np.zeros((max(-(-len(ids) // self.length), 1), self.length), np.int32)
        segments.reshape(-1)[: len(ids)] = ids
        return segments

    def check(self, questions: Sequence[Segments], name: str) -> None:
        """Raises a `SequenceTooLong` for a question with more than `segments` segments, in the conversation `name`."""
        most = max(map(len, questions), default=0)
        if most > self.segments:
            raise SequenceTooLong(
                f"sample '{name}' has a question of {most} segments of {self.length} tokens each, over the limit of "
                f"{self.segments}; raise segments of the reducer to {most} or more, or shorten the question (nothing "
                "is truncated)"
            )

    def batched(self, rows: Sequence[Sequence[Segments]], num_images: int, *, static: bool) -> Question:
        """The questions of every image of every row, padded to one number of segments.

        That is `segments` where it must be `static`, which all rows are made for; else a power of two, so that few
        programs are compiled.
        """
        most = max((len(segments) for row in rows for segments in row), default=1)
        most = self.segments if static else 1 << (most - 1).bit_length()
        tokens = np.zeros((len(rows), num_images, most, self.length), np.int32)
        mask = np.zeros(tokens.shape[:3], bool)
        for number, row in enumerate(rows):
            for image, segments in enumerate(row):
                tokens[number, image, : len(segments)], mask[number, image, : len(segments)] = segments, True
        return Question(tokens, mask)


def questions_of(messages: Sequence[Message], placeholders: Collection[str]) -> dict[int, str]:
    """The texts of every message of the user that has some, by its number, without what stands for pictures."""
    found: dict[int, list[str]] = {}
    for number, text in texts_of(messages):
        if messages[number].get("role") == "user":
            found.setdefault(number, []).append(_any_of(placeholders).sub("", text) if placeholders else text)
    joined = {number: "\n".join(texts).strip() for number, texts in found.items()}
    return {number: text for number, text in joined.items() if text}


def messages_of(messages: Sequence[Message], kind: Kind, placeholders: Collection[str]) -> list[int]:
    """The number of the message of every image or video, whether an item or a placeholder in a text stands for it."""
    found = [number for number, item in media_items(messages) if item["type"] == kind]
    if placeholders:
        found += [number for number, text in texts_of(messages) for _ in _any_of(placeholders).findall(text)]
    return sorted(found)


def _any_of(placeholders: Collection[str]) -> re.Pattern[str]:
    """Any of the placeholders, the longest first, since one may be a part of another."""
    return re.compile("|".join(map(re.escape, sorted(placeholders, key=len, reverse=True))))

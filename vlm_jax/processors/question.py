"""The question of a conversation, as segments for a text tower, for reducers that choose by it."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from vlm_jax.processors.items import texts_of
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Message, Question


@dataclasses.dataclass(frozen=True)
class QuestionTexts:
    """Converts the question of a conversation to ids.

    Attributes:
      tokenizer: of the text tower; adds its start and end tokens.
      length: positions of the text tower; a longer question is cut into segments of this length, each without start
        and end tokens of its own, as CDPruner released it.
      which: the `first` question of the conversation, or the `last`.
      table_rows: number of tokens in the tower's table.
    """

    tokenizer: Tokenizer
    length: int
    which: Literal["first", "last"]
    table_rows: int

    def text(self, messages: Sequence[Message], placeholders: Sequence[str]) -> str:
        """The texts of the user's first or last message, without what stands for pictures."""
        asked = [number for number, message in enumerate(messages) if message.get("role") == "user"]
        if not asked:
            return ""
        number = asked[0] if self.which == "first" else asked[-1]
        found = "\n".join(text for own, text in texts_of(messages) if own == number)
        for mark in placeholders:
            found = found.replace(mark, "")
        return found.strip()

    def __call__(
        self, messages: Sequence[Message], placeholders: Sequence[str], name: str
    ) -> Int[np.ndarray, "S length"]:
        """The segments, the last one filled with zeros, which follow its end token.

        Raises:
          TokenizerError: a token of the text for which the tower has no row.
        """
        ids = self.tokenizer.encode(self.text(messages, placeholders), add_special=True)
        self.tokenizer.check_rows(ids, self.table_rows, name)
        segments = np.zeros((max(-(-len(ids) // self.length), 1), self.length), np.int32)
        segments.reshape(-1)[: len(ids)] = ids
        return segments

    def batched(self, rows: Sequence[Sequence[np.ndarray]], num_images: int) -> Question:
        """The segments of every image of every row, padded to a power of two, so that few programs are compiled."""
        most = max((len(segments) for row in rows for segments in row), default=1)
        most = 1 << (most - 1).bit_length()
        tokens = np.zeros((len(rows), num_images, most, self.length), np.int32)
        mask = np.zeros(tokens.shape[:3], bool)
        for number, row in enumerate(rows):
            for image, segments in enumerate(row):
                tokens[number, image, : len(segments)], mask[number, image, : len(segments)] = segments, True
        return Question(tokens, mask)

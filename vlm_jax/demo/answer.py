"""An answer that comes piece by piece, and what a page shows of a question."""

import dataclasses

from PIL import Image

from vlm_jax.generation.text import Completion


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, or what there is of it.

    Attributes:
      text: so far.
      completion: the whole answer; None before its end.
      first_seconds: from the question to the first text; None while there is none, or a program was compiled meanwhile.
      seconds: from the question to the end; None likewise.
    """

    text: str = ""
    completion: Completion | None = None
    first_seconds: float | None = None
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a page shows of a question.

    Attributes:
      stage: what happens now; empty at the end.
      budget: the answer at the token budget.
      full: the answer at the full budget.
      drawing: the picture with the kept parts and the boxes of `budget`.
      caption: what `drawing` shows.
      full_drawing: the picture with the boxes of `full`; None where it has none.
    """

    stage: str
    budget: Answer = Answer()
    full: Answer = Answer()
    drawing: Image.Image | None = None
    caption: str = ""
    full_drawing: Image.Image | None = None

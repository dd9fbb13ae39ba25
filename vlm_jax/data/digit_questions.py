"""Questions about a page of digits, and their answers.

| task | question | answer |
|---|---|---|
| read | `read row 2 column 3` | the digit in that cell; rows and columns count from 1 |
| transcribe | `transcribe row 2` | the row's digits, as `7419` |
| count | `count 7` | number of cells with a 7, possibly 0 |
| locate | `locate row 2 column 3` | the box of the ink of the digit in that cell, as the box formatter writes it |
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from vlm_jax.data.pages import Page
from vlm_jax.data.scans import NUM_CLASSES
from vlm_jax.types import Turn

TASKS = ("read", "transcribe", "count", "locate")
# Probability that `count` is about a digit of the page; else about any digit, which often does not occur.
COUNT_PRESENT = 0.8
BLANK = "."  # a place without a digit, in a page as text


def ask(task: str, page: Page, draws: Sequence[float], format_box: Callable[..., str]) -> Turn:
    """Creates one question about a page and its answer.

    Args:
      task: one of TASKS.
      page: the page.
      draws: three random numbers in [0, 1) that select one of the task's questions.
      format_box: (box in pixels, height, width) -> text.
    """
    classes = page.classes
    rows, cols = classes.shape
    row, col = int(draws[0] * rows), int(draws[1] * cols)
    if task == "read":
        return Turn(f"read row {row + 1} column {col + 1}", str(int(classes[row, col])), task)
    if task == "transcribe":
        return Turn(f"transcribe row {row + 1}", "".join(map(str, classes[row].tolist())), task)
    if task == "count":
        digit = int(classes[row, col])
        if draws[2] >= COUNT_PRESENT:
            digit = int((draws[2] - COUNT_PRESENT) / (1.0 - COUNT_PRESENT) * NUM_CLASSES)
        return Turn(f"count {digit}", str(int(np.count_nonzero(classes == digit))), task)
    if task == "locate":
        height, width, _ = page.pixels.shape
        return Turn(
            f"locate row {row + 1} column {col + 1}", format_box(page.boxes[row, col].tolist(), height, width), task
        )
    raise ValueError(f"unknown task '{task}'; expected one of {', '.join(TASKS)}")


def digits_in_reading_order(page: Page) -> str:
    """The digits of a page row by row, without separators."""
    return "".join(map(str, page.classes.ravel().tolist()))


def page_as_text(page: Page, cell: int, places: int) -> str:
    """A page as text, row by row and without separators, like a grid of visual tokens.

    Args:
      page: the page.
      cell: characters of a row or column of a cell: 1 for its digit alone, else a multiple of `places`, for squares of
        copies of the digit in its place and of `BLANK` in the others.
      places: of a row or column of a cell.
    """
    classes, copies = (page.classes, 1) if cell == 1 else (with_blanks(page, places), cell // places)
    classes = classes.repeat(copies, 0).repeat(copies, 1)
    return "".join("0123456789"[one] if one < NUM_CLASSES else BLANK for one in classes.ravel().tolist())


def with_blanks(page: Page, places: int) -> Int[np.ndarray, "RP CP"]:
    """The digit in every place of a page, NUM_CLASSES in those without."""
    rows, cols = page.classes.shape
    classes = np.full((rows * places, cols * places), NUM_CLASSES)
    classes[page.places[..., 0], page.places[..., 1]] = page.classes
    return classes

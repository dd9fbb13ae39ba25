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

from vlm_jax.data.pages import Page
from vlm_jax.data.scans import NUM_CLASSES
from vlm_jax.types import Turn

TASKS = ("read", "transcribe", "count", "locate")
# Probability that `count` is about a digit of the page; else about any digit, which often does not occur.
COUNT_PRESENT = 0.8


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
        box = format_box(page.boxes[row, col].tolist(), height, width)
        return Turn(f"locate row {row + 1} column {col + 1}", box, task)
    raise ValueError(f"unknown task '{task}'; expected one of {', '.join(TASKS)}")


def digits_in_reading_order(page: Page, scale: int = 1) -> str:
    """The page as text: its digits row by row, without separators.

    Every cell is written as a square of `scale` by `scale` copies of its digit, like a finer grid of
    visual tokens.
    """
    return "".join(map(str, page.classes.repeat(scale, 0).repeat(scale, 1).ravel().tolist()))

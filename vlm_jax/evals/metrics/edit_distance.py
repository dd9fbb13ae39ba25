"""Levenshtein's distance of long sequences."""

from collections.abc import Hashable, Sequence

import numpy as np

from vlm_jax.data import spelling

FEW = 4096  # cells of a table that plain Python fills as fast


def edits(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Levenshtein's distance: insertions, deletions and replacements that turn one sequence into the other.

    Args:
      first, second: texts, or lists of words. A row of the table is a few operations of NumPy, so that pages of
        thousands of characters take less than a second.

    Source: Wagner and Fischer 1974; insertions of a row by a cumulative minimum.
    """
    if len(first) > len(second):
        first, second = second, first
    numbers: dict[Hashable, int] = {}
    rows, columns = ([numbers.setdefault(item, len(numbers)) for item in items] for items in (first, second))
    if len(rows) * len(columns) < FEW:
        return spelling.edits(rows, columns)
    compared, offsets = np.array(columns, np.int64), np.arange(len(columns) + 1)
    row = offsets
    for count, item in enumerate(rows, start=1):
        best = np.minimum(row[1:] + 1, row[:-1] + (compared != item))
        row = np.minimum.accumulate(np.concatenate(([count], best)) - offsets) + offsets
    return int(row[-1])

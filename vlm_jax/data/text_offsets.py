"""Byte offsets of the lines of a file, and of the elements of a JSON array, found in one pass of bounded memory.

Offsets are int64 arrays: 8 bytes a record for an array, 16 for lines.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from vlm_jax.data.local_file import LocalFile

CHUNK = 1 << 22
_SPACE = b" \t\r\n"
_IS_SPACE = np.isin(np.arange(256), list(_SPACE))
_STRUCTURE = np.isin(np.arange(256), list(b'"\\[]{},'))
_DEPTH = np.zeros(256, np.int64)
_DEPTH[list(b"[{")] = 1
_DEPTH[list(b"]}")] = -1

Spans = Int[np.ndarray, "n 2"]


class Unbalanced(ValueError):
    """A JSON array that does not end, or with text behind its end.

    Attributes:
      offset: where the fault shows.
      spans: of the elements before it and of what follows them, if the fault may be in them.
    """

    def __init__(self, reason: str, offset: int, spans: Spans):
        super().__init__(reason)
        self.offset, self.spans = offset, spans


def _chunks(file: LocalFile, start: int) -> Iterator[tuple[int, np.ndarray]]:
    """(offset, bytes) of consecutive parts, none of which ends in a backslash unless the file does."""
    while start < file.size:
        part = file.read(start, CHUNK)
        while part.endswith(b"\\") and start + len(part) < file.size:
            part += file.read(start + len(part), 1)
        yield start, np.frombuffer(part, np.uint8)
        start += len(part)


def line_spans(file: LocalFile, start: int = 0) -> tuple[Spans, Int[np.ndarray, "n"] | None]:
    """[start, stop) of every line that is not blank, and their line numbers from 1 if some line is blank.

    Args:
      file: what to read.
      start: offset of the first line, behind a byte order mark.
    """
    breaks = [np.array([start - 1])]
    breaks += [offset + np.flatnonzero(part == ord("\n")) for offset, part in _chunks(file, start)]
    ends = np.concatenate(breaks)
    if ends[-1] != file.size - 1:
        ends = np.append(ends, file.size)
    spans = np.stack([ends[:-1] + 1, ends[1:]], axis=1)
    keep = spans[:, 1] > spans[:, 0]
    for number in _starting_blank(file, spans, keep):
        first, last = spans[number]
        keep[number] = bool(file.read(int(first), int(last - first)).strip(_SPACE))
    if keep.all():
        return spans, None
    return spans[keep], np.flatnonzero(keep) + 1


def _starting_blank(file: LocalFile, spans: Spans, keep: np.ndarray) -> Iterator[int]:
    """Indices of non-empty lines whose first byte is white space."""
    starts = spans[:, 0]
    for offset in range(0, file.size, CHUNK):
        first, last = np.searchsorted(starts, [offset, offset + CHUNK])
        if first == last:
            continue
        part = np.frombuffer(file.read(offset, CHUNK), np.uint8)
        found = starts[first:last]
        here = found < offset + len(part)
        blank = np.zeros(len(found), bool)
        blank[here] = _IS_SPACE[part[found[here] - offset]]
        yield from (first + np.flatnonzero(blank & keep[first:last])).tolist()


def array_spans(file: LocalFile, start: int) -> Spans:
    """[start, stop) of every element of a JSON array; what is between its commas, with white space.

    Args:
      file: what to read.
      start: offset of the opening bracket.

    Raises:
      Unbalanced: brackets and quotes do not end where the file does. Other faults are inside of elements.
    """
    marks = [np.array([start])]
    depth, in_string, end = 0, False, None
    for offset, part in _chunks(file, start):
        if end is not None:
            _check_tail(part, offset)
            continue
        places = np.flatnonzero(_STRUCTURE[part])
        quotes = places[(part[places] == ord('"')) & ~_escaped(part, places)]
        others = places[(part[places] != ord('"')) & (part[places] != ord("\\"))]
        outside = (np.searchsorted(quotes, others) + in_string) % 2 == 0
        others = others[outside]
        depths = depth + np.cumsum(_DEPTH[part[others]])
        closed = np.flatnonzero(depths == 0)
        if len(closed):
            last = offset + int(others[closed[0]])
            if part[last - offset] != ord("]"):
                commas = others[: closed[0]][(part[others] == ord(","))[: closed[0]] & (depths[: closed[0]] == 1)]
                raise Unbalanced(
                    "a bracket of another kind ends it", last, _between([*marks, offset + commas], last + 1)
                )
            others, depths = others[: closed[0] + 1], depths[: closed[0] + 1]
            end = offset + int(others[-1])
        marks.append(offset + others[(part[others] == ord(",")) & (depths == 1)])
        in_string = bool((len(quotes) + in_string) % 2)
        depth = int(depths[-1]) if len(depths) else depth
        if end is not None:
            _check_tail(part[end + 1 - offset :], end + 1)
    if end is None:
        raise Unbalanced("the array does not end", file.size, _between(marks, file.size))
    spans = _between(marks, end)
    if len(spans) == 1 and not file.read(int(spans[0, 0]), int(spans[0, 1] - spans[0, 0])).strip(_SPACE):
        return spans[:0]
    return spans


def _between(marks: list[np.ndarray], end: int) -> Spans:
    bounds = np.append(np.concatenate(marks), end)
    return np.stack([bounds[:-1] + 1, bounds[1:]], axis=1)


def _check_tail(part: np.ndarray, offset: int) -> None:
    extra = np.flatnonzero(~_IS_SPACE[part])
    if len(extra):
        raise Unbalanced("text follows the end of the array", offset + int(extra[0]), np.zeros((0, 2), np.int64))


def _escaped(part: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Which of `places` follow an odd number of backslashes."""
    slashes = places[part[places] == ord("\\")]
    if not len(slashes):
        return np.zeros(len(places), bool)
    starts = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)
    lengths = np.diff(np.append(starts, len(slashes)))
    after = slashes[starts] + lengths
    return np.isin(places, after[lengths % 2 == 1])

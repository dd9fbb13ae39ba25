"""Sequence packing of a stream, planned from the examples' loads before any image is decoded.

    rows = PackedRows(load_of, RowShape(2048, 8), seed=0, epoch=len(records), folder=workdir / "rows",
                      fingerprint=fingerprint({"data": ..., "processor": ..., "stream": ...}))
    rows[17]                             # stream elements of row 17, (3021, 3307, 118)
    grain.MapDataset.source(rows)        # a source of such tuples, mapped to batches of one row
    shapes = buckets(RowShape(2048, 8), 4)
    shape = bucket_of(rows.loads(range(step * batch_size, (step + 1) * batch_size)), shapes)

The stream is divided into windows of a few thousand consecutive elements. Elements of a window are measured
(`load_of`), packed by best fit decreasing, and the rows are shuffled by (seed, window). Rows are numbered
across all windows, so finding row i needs the numbers of rows of the windows up to it; these are
measured if no file has their number of rows, later ones are not. A plan is therefore a function of only the
stream, the seed and the shape: hosts, threads and worker processes each compute the same one, and the
bucket of a global batch is the same on all of them.

Loads are cached in files, one per window, `<window>-<number of rows>.npz`, in a folder named by a hash of
everything that the plan depends on. The file names are the prefix table. A file is written under a temporary name
and then renamed, so that it is always complete, also with several writers. A file that cannot be read
is measured and written again; a failed write is logged and ignored.
"""

import bisect
import dataclasses
import functools
import hashlib
import io
import json
import logging
import operator
import os
import re
import threading
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from vlm_jax.config import ConfigError
from vlm_jax.data.source import ENDLESS
from vlm_jax.types import ROW_KEYS, Load, RowShape

Row = tuple[int, ...]

WINDOW = 2048  # elements that are measured and packed together
WINDOWS_IN_MEMORY = 4
MAX_REPORTED = 20  # samples too large for a row that one error lists
FORMAT = 2  # of files and plans: raise it when the same loads would be packed differently
_FILE_NAME = re.compile(r"(\d{8,})-(\d+)\.npz")
_log = logging.getLogger(__name__)


class TooLargeForRow(ConfigError):
    """Samples that do not fit in an empty row; the message names them, the config key and the required size."""


class StalePlan(RuntimeError):
    """Files of a plan that disagree with the data or with each other."""


def fingerprint(parts: Mapping[str, Any]) -> str:
    """A short hash of JSON values, the same in every process and for any order of the keys."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def pack_window(
    loads: Sequence[Load], shape: RowShape, name_of: Callable[[int], str] = "element {}".format
) -> list[Row]:
    """Packs loads into few rows by best fit decreasing.

    From the longest load to the shortest (among ties by most images, then in order), each is added
    to the row with the least remaining length among those that can hold it (among ties the oldest), or
    to a new row.

    Args:
      loads: loads of the elements of a window; one of length 0, of a sample that cannot be read, is in no row.
      shape: shape of every row.
      name_of: index of a load -> name of its sample, for errors.

    Returns:
      Indices of the loads of each row, ascending, in the order of the rows' creation.

    Raises:
      TooLargeForRow: loads that do not fit in an empty row.
      ValueError: the numbers of drops of a load and the shape differ.
    """
    _check_loads(loads, shape, name_of)
    rows: list[list[int]] = []
    left: list[tuple[int, ...]] = []  # of each row: images, pictures, then positions after each drop
    pictures = sum(load.pictures for load in loads) if shape.pictures is None else shape.pictures
    # Rows as (length left, row), sorted. Those in `open_rows[b]` have images.bit_length() == b images left, so
    # that only one of the lists that a load looks at holds rows with too few.
    open_rows: list[list[tuple[int, int]]] = [[] for _ in range(shape.images.bit_length() + 1)]
    indices = [index for index, load in enumerate(loads) if load.length]
    shortest = min((loads[index].length for index in indices), default=0)
    for index in sorted(indices, key=lambda i: (-loads[i].length, -loads[i].images, i)):
        load = loads[index]
        need = (load.images, load.pictures, *load.kept)
        best: tuple[int, int] | None = None
        best_list = open_rows[0]
        for candidates in open_rows[load.images.bit_length() :]:
            for place in range(bisect.bisect_left(candidates, (load.length, 0)), len(candidates)):
                candidate = candidates[place]
                if best is not None and best < candidate:
                    break
                if all(map(operator.le, need, left[candidate[1]])):
                    best, best_list = candidate, candidates
                    break
        if best is None:
            length, row = shape.length, len(rows)
            rows.append([])
            left.append((shape.images, pictures, *shape.kept))
        else:
            length, row = best
            del best_list[bisect.bisect_left(best_list, best)]
        rows[row].append(index)
        left[row] = tuple(map(operator.sub, left[row], need))
        if length - load.length >= shortest:
            bisect.insort(open_rows[left[row][0].bit_length()], (length - load.length, row))
    return [tuple(sorted(row)) for row in rows]


def _check_loads(loads: Sequence[Load], shape: RowShape, name_of: Callable[[int], str]) -> None:
    faults: list[str] = []
    for index, load in enumerate(loads):
        if len(load.kept) != len(shape.kept):
            raise ValueError(
                f"{name_of(index)}: measured with {len(load.kept)} drops of visual tokens, but the row has "
                f"{len(shape.kept)}"
            )
        for words, need, size in shape.excess(load):
            key = ROW_KEYS.get(words, "config.row.kept")
            faults.append(f"{name_of(index)} needs {need} {words}, {key} is {size}")
    if faults:
        more = f"\n  and {len(faults) - MAX_REPORTED} more" if len(faults) > MAX_REPORTED else ""
        listed = "\n".join(f"  {fault}" for fault in faults[:MAX_REPORTED])
        raise TooLargeForRow(
            f"samples that do not fit in a row:\n{listed}{more}\nRaise the key, lower config.token_budget, or "
            "remove the samples; samples are never truncated."
        )


def buckets(shape: RowShape, count: int, multiple: int = 128) -> tuple[RowShape, ...]:
    """At most `count` shapes for rows of different lengths, shortest first, `shape` itself last.

    Lengths are 1/count, 2/count, ... of the full length, rounded up to a multiple, without duplicates.
    Lengths after drops shrink in proportion; all buckets have as many images as `shape`.

    Raises:
      ConfigError: count is not positive.
    """
    if count < 1:
        raise ConfigError(f"the number of length buckets must be at least 1, got {count}")
    lengths = {-(-shape.length * part // (count * multiple)) * multiple for part in range(1, count)}
    shorter = [
        dataclasses.replace(shape, length=length, kept=tuple(-(-kept * length // shape.length) for kept in shape.kept))
        for length in sorted(lengths)
        if length < shape.length
    ]
    made = (*shorter, shape)
    _log.info("%d row shapes, one program each: lengths %s", len(made), ", ".join(str(s.length) for s in made))
    return made


def bucket_of(loads: Iterable[Load], shapes: Sequence[RowShape]) -> RowShape:
    """The first of `shapes` that holds every row of a global batch.

    Args:
      loads: of all rows of the batch, including those of other hosts: `PackedRows.loads`.
      shapes: from `buckets`, shortest first.

    Raises:
      ValueError: the last one is too small.
    """
    rows = list(loads)
    for shape in shapes:
        if all(shape.holds(load) for load in rows):
            return shape
    raise ValueError(f"rows with the loads {rows} fit in none of {list(shapes)}")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Rows of one window, and the load of each."""

    rows: tuple[Row, ...]
    loads: tuple[Load, ...]


class SingleRows:
    """The plan in which every row is one element of an endless stream."""

    def __init__(
        self, load_of: Callable[[int], Load], shape: RowShape, *, name_of: Callable[[int], str] = "element {}".format
    ):
        """See `PackedRows`."""
        self._load_of, self._shape, self._name_of = load_of, shape, name_of

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, row: int) -> Row:
        return (row,)

    def loads(self, rows: Iterable[int]) -> list[Load]:
        """What each of these rows takes of its shape.

        Raises:
          TooLargeForRow: more than it has.
        """
        elements = list(rows)
        loads = [self._load_of(element) for element in elements]
        _check_loads(loads, self._shape, lambda index: self._name_of(elements[index]))
        return loads


class PackedRows:
    """Random access to the rows of a stream: row i is the tuple of the stream elements packed in it.

    Thread-safe; a pickled copy in another process plans independently.
    """

    def __init__(
        self,
        load_of: Callable[[int], Load],
        shape: RowShape,
        *,
        seed: int,
        epoch: int | None = None,
        repeat: bool = True,
        window: int = WINDOW,
        folder: str | os.PathLike[str] | None = None,
        fingerprint: str = "",
        name_of: Callable[[int], str] = "element {}".format,
        num_threads: int = 16,
    ):
        """Does not plan yet; reading the first row measures its window.

        Args:
          load_of: stream element -> its load. Called from several threads.
          shape: shape of every row.
          seed: seed of the order of rows.
          epoch: number of elements after which the stream repeats; no window spans two epochs.
            None for a stream without epochs.
          repeat: whether the stream continues after the first epoch.
          window: maximum number of elements packed together. An epoch is divided into windows of equal size (up to
            one element).
          folder: cache of loads, local or `gs://`, shared by hosts or not; None for no files.
          fingerprint: hash of everything that determines the stream's examples and their loads.
          name_of: stream element -> name of its sample, for errors.
          num_threads: threads that measure a window.

        Raises:
          ConfigError: the epoch is empty.
          ValueError: a finite stream without an epoch, window or num_threads below 1, or a folder
            without a fingerprint.
        """
        if epoch is not None and epoch < 1:
            raise ConfigError(f"config.data: an epoch needs at least 1 sample, got {epoch}")
        if window < 1 or num_threads < 1:
            raise ValueError(f"window and num_threads must be at least 1, got {window} and {num_threads}")
        if epoch is None and not repeat:
            raise ValueError("a stream without repeat needs its number of elements as epoch")
        if folder is not None and not fingerprint:
            raise ValueError("a folder for loads needs a fingerprint of the data")
        self.shape = shape
        self._load_of, self._name_of, self._num_threads = load_of, name_of, num_threads
        self._seed, self._epoch, self._repeat, self._window = seed, epoch, repeat, window
        self._windows_per_epoch = 1 if epoch is None else -(-epoch // window)
        self._folder = None if folder is None else epath.Path(folder) / self._folder_name(fingerprint)
        self._start_over()

    def _folder_name(self, data: str) -> str:
        settings = {"data": data, "seed": self._seed, "epoch": self._epoch, "window": self._window}
        return fingerprint({**settings, "shape": dataclasses.asdict(self.shape), "format": FORMAT})

    def _start_over(self) -> None:
        self._lock = threading.RLock()
        self._plans: OrderedDict[int, _Plan] = OrderedDict()
        self._ends: list[int] = []  # cumulative numbers of rows of the windows
        self._listed: dict[int, int] | None = None  # numbers of rows per window, from the file names

    def __getstate__(self) -> dict[str, Any]:
        mutable = ("_lock", "_plans", "_ends", "_listed")
        return {key: value for key, value in self.__dict__.items() if key not in mutable}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start_over()

    def __len__(self) -> int:
        """Number of rows; for a finite stream exact, which measures the whole stream."""
        if self._repeat:
            return ENDLESS
        with self._lock:
            self._extend_to_window(self._windows_per_epoch - 1)
            return self._ends[-1]

    def __getitem__(self, row: int) -> Row:
        """Stream elements of a row, ascending.

        Raises:
          IndexError: no such row.
          TooLargeForRow: a sample of the row's window, or of a previous one, fits in no row.
        """
        plan, place = self._locate(row)
        return plan.rows[place]

    def loads(self, rows: Iterable[int]) -> list[Load]:
        """The loads of these rows."""
        return [plan.loads[place] for plan, place in map(self._locate, rows)]

    def _locate(self, row: int) -> tuple[_Plan, int]:
        """The plan of a row's window, and the row's index in it."""
        row = operator.index(row)
        if row < 0:
            raise IndexError(f"expected a row index of at least 0, got {row}")
        with self._lock:
            while not self._ends or self._ends[-1] <= row:
                if not self._repeat and len(self._ends) == self._windows_per_epoch:
                    raise IndexError(f"the data has {self._ends[-1]} rows, but not row {row}")
                self._extend_to_window(len(self._ends))
            window = bisect.bisect_right(self._ends, row)
            return self._plan(window), row - (self._ends[window - 1] if window else 0)

    def _extend_to_window(self, last: int) -> None:
        """Extends the prefix table to window `last`."""
        for window in range(len(self._ends), last + 1):
            count = self._listing().get(window)
            if count is None:
                count = len(self._plan(window).rows)
            self._ends.append(count + (self._ends[-1] if self._ends else 0))
            if len(self._ends) >= self._windows_per_epoch and not self._ends[-1]:
                raise ConfigError("config.data: expected samples that can be read, got none in an epoch")

    def _plan(self, window: int) -> _Plan:
        if window in self._plans:
            self._plans.move_to_end(window)
            return self._plans[window]
        elements = self._elements(window)
        loads, kept = self._read(window), True
        if loads is None:
            _log.info("measuring window %d, %d samples", window, len(elements))
            loads, kept = self._measure(elements), False
        packed = pack_window(loads, self.shape, lambda index: self._name_of(elements[index]))
        if self._listing().setdefault(window, len(packed)) != len(packed):
            raise StalePlan(
                f"{self._folder}: window {window} has {len(packed)} rows, but its file name has "
                f"{self._listing()[window]}: the data changed with the same fingerprint; remove the folder"
            )
        if not kept:
            self._write(window, loads, len(packed))
        packed = _shuffled(packed, self._seed, window)
        plan = _Plan(
            tuple(tuple(elements[index] for index in row) for row in packed),
            tuple(functools.reduce(operator.add, (loads[index] for index in row)) for row in packed),
        )
        self._plans[window] = plan
        if len(self._plans) > WINDOWS_IN_MEMORY:
            self._plans.popitem(last=False)
        return plan

    def _elements(self, window: int) -> range:
        """Stream elements of a window."""
        if self._epoch is None:
            return range(window * self._window, (window + 1) * self._window)
        epoch, part = divmod(window, self._windows_per_epoch)
        first, last = (self._epoch * edge // self._windows_per_epoch for edge in (part, part + 1))
        return range(epoch * self._epoch + first, epoch * self._epoch + last)

    def _measure(self, elements: range) -> list[Load]:
        with ThreadPoolExecutor(min(self._num_threads, len(elements))) as pool:
            return list(pool.map(self._load_of, elements))

    def _listing(self) -> dict[int, int]:
        """Numbers of rows by window: those from file names, and those computed since."""
        if self._listed is None:
            self._listed = {}
            if self._folder is not None and self._folder.exists():
                self._take_names(path.name for path in self._folder.iterdir())
        return self._listed

    def _take_names(self, names: Iterable[str]) -> None:
        listed = self._listing()
        for match in filter(None, map(_FILE_NAME.fullmatch, names)):
            window, count = int(match[1]), int(match[2])
            if listed.setdefault(window, count) != count:
                raise StalePlan(
                    f"{self._folder}: window {window} has files for {listed[window]} and for {count} rows; "
                    "remove the folder"
                )

    def _path(self, window: int, count: int) -> epath.Path:
        assert self._folder is not None
        return self._folder / f"{window:08d}-{count}.npz"

    def _read(self, window: int) -> list[Load] | None:
        """Loads of a window from its file, which another process may have written."""
        if self._folder is None:
            return None
        if window not in self._listing() and self._folder.exists():
            self._take_names(path.name for path in self._folder.glob(f"{window:08d}-*.npz"))
        count = self._listing().get(window)
        if count is None or not (path := self._path(window, count)).exists():
            return None
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                table = file["loads"]
            expected = (len(self._elements(window)), 3 + len(self.shape.kept))
            if table.shape != expected:
                raise ValueError(f"expected loads of the shape {expected}, got {table.shape}")
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            _log.warning("%s cannot be read and is recomputed: %s", path, error)
            return None
        return [Load(length, images, tuple(kept), pictures) for length, images, pictures, *kept in table.tolist()]

    def _write(self, window: int, loads: Sequence[Load], count: int) -> None:
        if self._folder is None:
            return
        data = io.BytesIO()
        table = [(load.length, load.images, load.pictures, *load.kept) for load in loads]
        np.savez(data, loads=np.array(table, np.int64))
        path = self._path(window, count)
        partial = self._folder / f".{path.name}.{uuid.uuid4().hex}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(data.getvalue())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s cannot be written; its loads are measured again when needed: %s", path, error)


def _shuffled(rows: Sequence[Row], seed: int, window: int) -> list[Row]:
    """Shuffles rows by (seed, window) only, independently of library versions."""

    def key(place: int) -> bytes:
        return hashlib.blake2b(f"{seed} {window} {place}".encode(), digest_size=16).digest()

    return [rows[place] for place in sorted(range(len(rows)), key=key)]

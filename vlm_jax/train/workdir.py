"""Files of a run's folder: written as a whole, or as one line per step."""

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import IO

from etils import epath

from vlm_jax.sharding.processes import is_primary
from vlm_jax.types import Fields

CONFIG_FILE, METRICS_FILE = "config.json", "metrics.jsonl"
INIT_FROM = "init_from"  # key of `config.json` for where a run started; None for its own release or random parameters

_log = logging.getLogger(__name__)


class WorkdirError(ValueError):
    """A file of a run's folder that cannot be read or written; the message names it and the fix."""


@contextlib.contextmanager
def _draft(path: epath.Path) -> Iterator[IO[str]]:
    """A file under a temporary name, renamed after it is written, so that the file at `path` is always complete."""
    draft = path.with_name(path.name + ".partial")
    with draft.open("w") as file:
        yield file
    draft.replace(path)


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file that is always complete."""
    with _draft(path) as file:
        file.write(text)


@contextlib.contextmanager
def whole_file(path: epath.Path) -> Iterator[IO[str]]:
    """A file to write piece by piece, which gets its name when all is written; the primary process writes it."""
    if not is_primary():
        with open(os.devnull, "w") as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _draft(path) as file:
        yield file


def write_lines(path: epath.Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Writes a JSON-lines file, line by line, that is always complete; the primary process does."""
    if is_primary():
        with _draft(path) as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


class MetricsLog:
    """One JSON line per step in `metrics.jsonl`.

    Args:
      workdir: the run's folder.
      step: steps done so far; lines of later steps, written by a run that was
        killed after its last checkpoint, are removed, since those steps are repeated.
    """

    def __init__(self, workdir: epath.Path, step: int):
        self._path = workdir / METRICS_FILE
        steps = 0

        def kept() -> Iterator[Fields]:
            nonlocal steps
            for line in each_line(self._path):
                if line["step"] <= step:
                    steps += 1
                    yield line

        write_lines(self._path, kept())
        if is_primary() and steps < step:
            _log.warning("%s: has the lines of %d of %d steps; it was cut short, or changed", self._path, steps, step)

    def read(self) -> list[Fields]:
        """All lines so far, including those of earlier runs."""
        return read_lines(self._path)

    def append(self, lines: Iterable[Fields]) -> None:
        """Appends complete lines; for the primary process.

        Raises:
          WorkdirError: they cannot be written.
        """
        if not is_primary():
            return
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            with self._path.open("a") as file:
                file.write(text)
        except OSError as error:
            raise WorkdirError(
                f"{self._path}: cannot be written ({error.strerror}): the folder was removed, or its disk is full. "
                "Rerun the same command to resume from the newest checkpoint"
            ) from error


def read_lines(path: epath.Path) -> list[Fields]:
    """The objects of a JSON-lines file; see `each_line`."""
    return list(each_line(path))


def each_line(path: epath.Path) -> Iterator[Fields]:
    """The objects of a JSON-lines file, one at a time; a last line that was truncated by a kill is ignored.

    Raises:
      WorkdirError: a line before the last is not a JSON object.
    """
    if not path.exists():
        return
    broken: bytes | None = None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if broken is not None:
                raise WorkdirError(
                    f"{path}:{number - 1}: expected a JSON object, got {broken[:80]!r}; remove the line, and rerun "
                    "the same command"
                )
            try:
                value = json.loads(line)
            except ValueError:  # also for bytes that are not text
                value = None
            if isinstance(value, dict):
                yield value
            else:
                broken = line

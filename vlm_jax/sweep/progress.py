"""What a sweep or an evaluation prints: a live display on a terminal, a line every 15 seconds elsewhere, and tables."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.progress

LINE_SECONDS = 15.0


class PointsProgress:
    """Steps (or questions) and points done, and time left; a context manager.

    Args:
      console: where it is printed.
      unit: what is counted, as "steps".
      total: of these.
      num_points: points.
      line_seconds: between two lines, where the console is no terminal.
    """

    def __init__(
        self, console: rich.console.Console, unit: str, total: int, num_points: int, line_seconds: float = LINE_SECONDS
    ):
        self._console, self._unit, self._total, self._num_points = console, unit, total, num_points
        self._seconds, self._note, self._points = line_seconds, "starting", 0
        self._done: dict[str, int] = {}
        self._first: dict[str, int] = {}  # what an earlier process had done of a run
        self._begun = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print_lines, daemon=True)
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> "PointsProgress":
        if not self._console.is_terminal:
            self._thread.start()
            return self
        columns = (
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
            rich.progress.TextColumn("{task.fields[note]}", markup=False),
        )
        self._bar = rich.progress.Progress(*columns, console=self._console, speed_estimate_period=120)
        self._units = self._bar.add_task(self._unit, total=self._total, note="")
        self._whole = self._bar.add_task("points", total=self._num_points, note="")
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()
        else:
            self._thread.join()

    def advance(self, run: str, done: int, note: str) -> None:
        """So many units of a run are done."""
        self._first.setdefault(run, done)
        self._done[run], self._note = done, note
        if self._bar is not None:
            self._bar.update(self._units, completed=sum(self._done.values()), note=note)

    def next_point(self) -> None:
        """A point is done, or has failed."""
        self._points += 1
        if self._bar is not None:
            self._bar.update(self._whole, completed=self._points)

    def _print_lines(self) -> None:
        while not self._ended.wait(self._seconds):
            self._console.print(self.line(), soft_wrap=True, highlight=False, markup=False)

    def line(self) -> str:
        """Where the work stands, as one line of text."""
        done, elapsed = sum(self._done.values()), time.monotonic() - self._begun
        own = done - sum(self._first.values())
        left = f", {duration(elapsed / own * (self._total - done))} left" if own > 0 else ""
        counted = f"{self._points}/{self._num_points} points, {done}/{self._total} {self._unit}"
        return f"{counted}, {duration(elapsed)}{left}: {self._note}"


def duration(seconds: float | int) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def text_table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first row is its heading, first columns are aligned to the left and others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [title]
    for row in rows:
        cells = [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(" ".join(cells).rstrip())
    return "\n".join(lines)

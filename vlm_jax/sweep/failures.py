"""Points of a sweep that failed, or were stopped: they are named, and the others go on."""

import rich.console
from etils import epath

from vlm_jax.train.workdir import write_lines

FAILED_FILE, STOPPED_FILE = "failed.jsonl", "stopped.jsonl"


class Failures:
    """The points of one call that failed, kept in `failed.jsonl`, and those that were stopped, in `stopped.jsonl`.

    Both start empty; the second is written where there is a point for it.

    Args:
      workdir: folder of the sweep.
      console: where a failure is said.

    Attributes:
      errors: {label: error} of the points that failed.
      stopped: {label: where} of the points that were stopped.
    """

    def __init__(self, workdir: epath.Path, console: rich.console.Console):
        self.errors: dict[str, str] = {}
        self.stopped: dict[str, str] = {}
        self._workdir, self._console = workdir, console
        self._write()
        if (workdir / STOPPED_FILE).exists():
            self._write_stopped()

    def add(self, label: str, error: str) -> None:
        """Says and keeps the error of a point."""
        self.errors[label] = error
        self._console.print(f"{label}: failed: {error}", markup=False)
        self._write()

    def add_stopped(self, label: str, where: str) -> None:
        """Says and keeps where a point was stopped."""
        self.stopped[label] = where
        self._console.print(f"{label}: stopped {where}", markup=False, soft_wrap=True)
        self._write_stopped()

    def _write(self) -> None:
        lines = [{"label": label, "error": error} for label, error in self.errors.items()]
        write_lines(self._workdir / FAILED_FILE, lines)

    def _write_stopped(self) -> None:
        lines = [{"label": label, "stopped": where} for label, where in self.stopped.items()]
        write_lines(self._workdir / STOPPED_FILE, lines)


def summary(failed: dict[str, str], num_points: int, workdir: epath.Path) -> str:
    """One sentence for the user, where points failed."""
    return (
        f"{len(failed)} of {num_points} points failed: {', '.join(failed)}; see {workdir / FAILED_FILE}. "
        "The same command tries them again"
    )

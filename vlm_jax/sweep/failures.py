"""Points of a sweep that failed: they are named, and the others go on."""

import rich.console
from etils import epath

from vlm_jax.train.workdir import write_lines

FAILED_FILE = "failed.jsonl"


class Failures:
    """The points of one call that failed, kept in `failed.jsonl`, which starts empty.

    Args:
      workdir: folder of the sweep.
      console: where a failure is said.
    """

    def __init__(self, workdir: epath.Path, console: rich.console.Console):
        self.errors: dict[str, str] = {}
        self._path, self._console = workdir / FAILED_FILE, console
        self._write()

    def add(self, label: str, error: str) -> None:
        """Says and keeps the error of a point."""
        self.errors[label] = error
        self._console.print(f"{label}: failed: {error}", markup=False)
        self._write()

    def _write(self) -> None:
        write_lines(self._path, [{"label": label, "error": error} for label, error in self.errors.items()])


def summary(failed: dict[str, str], num_points: int, workdir: epath.Path) -> str:
    """One sentence for the user, where points failed."""
    return (
        f"{len(failed)} of {num_points} points failed: {', '.join(failed)}; see {workdir / FAILED_FILE}. "
        "The same command tries them again"
    )

"""A run's folder: its config, and its metrics per step."""

import json
from collections.abc import Iterable, Mapping

from etils import epath

from vlm_jax.config import ConfigError, RunConfig, differences, plain
from vlm_jax.sharding.processes import is_primary
from vlm_jax.types import Fields

CONFIG_FILE, METRICS_FILE = "config.json", "metrics.jsonl"


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file under a temporary name and renames it, so that it is always complete."""
    draft = path.with_name(path.name + ".partial")
    draft.write_text(text)
    draft.replace(path)


def write_lines(path: epath.Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Writes a JSON-lines file as a whole; the primary process does."""
    if is_primary():
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def claim(workdir: epath.Path, config: RunConfig) -> None:
    """Creates the folder for a config, or checks that it has the same config; for the primary process.

    Raises:
      ConfigError: the folder has another config; the message lists the differences.
    """
    if not is_primary():
        return
    path = workdir / CONFIG_FILE
    ours = plain(config)
    if path.exists():
        lines = differences(json.loads(path.read_text()), ours)
        if lines:
            raise ConfigError(
                f"{workdir} was created with another config; use another --workdir, or the original config. "
                "In the folder (here) and in this run (there):\n  " + "\n  ".join(lines)
            )
        return
    if workdir.exists() and any(workdir.iterdir()):
        raise ConfigError(
            f"{workdir} is not empty and has no {CONFIG_FILE}, so it is not a run's folder; use another --workdir"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(ours, indent=2) + "\n")


class MetricsLog:
    """One JSON line per step in `metrics.jsonl`.

    Args:
      workdir: the run's folder.
      step: steps done so far; lines of later steps, written by a run that was
        killed after its last checkpoint, are removed, since those steps are repeated.
    """

    def __init__(self, workdir: epath.Path, step: int):
        self._path = workdir / METRICS_FILE
        if not is_primary():
            return
        lines = [line for line in read_lines(self._path) if line["step"] <= step]
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in lines))

    def read(self) -> list[Fields]:
        """All lines so far, including those of earlier runs."""
        return read_lines(self._path)

    def append(self, lines: Iterable[Fields]) -> None:
        """Appends complete lines; for the primary process."""
        if not is_primary():
            return
        with self._path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: epath.Path) -> list[Fields]:
    """The objects of a JSON-lines file; a last line that was truncated by a kill is ignored.

    Raises:
      ValueError: a line before the last is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a JSON line: {line[:80]!r}") from error
    return objects

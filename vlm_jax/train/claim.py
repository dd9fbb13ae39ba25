"""Exclusive use of a run's folder: one process at a time, one config, one start."""

import contextlib
import fnmatch
import json
import logging
import os
from collections.abc import Callable, Iterator

import jax
from etils import epath

from vlm_jax.checkpoints.orbax import CHECKPOINTS
from vlm_jax.config import ConfigError, RunConfig, differences, plain, read_json
from vlm_jax.paths import absolute, is_remote
from vlm_jax.sharding.processes import is_primary
from vlm_jax.train.copies import COPIES_ID
from vlm_jax.train.input import ROWS
from vlm_jax.train.lock import lock, unwritable
from vlm_jax.train.watchdog import HEARTBEATS
from vlm_jax.train.workdir import CONFIG_FILE, INIT_FROM, METRICS_FILE, write_whole
from vlm_jax.train.writers import TENSORBOARD, WANDB, WANDB_ID
from vlm_jax.types import Fields, Tree

LOCK_FILE = "run.lock"
# Files and folders that a run writes before its first step.
EARLY = (LOCK_FILE, HEARTBEATS, ROWS, CHECKPOINTS, COPIES_ID, METRICS_FILE, TENSORBOARD, WANDB, WANDB_ID)
# Keys that change no number of the steps already taken, as patterns of paths; all others are those of the first start.
FREE = (
    "config.loop.*",
    # But for rounding; and with `accumulate` above 1, a microbatch has rows of every shard, so that another number of
    # shards composes it otherwise: dropout of LoRA and a balance loss over a batch then differ.
    "config.mesh.*",
    "config.evaluation.*",
    "config.data.evaluation_*",
    "config.data.max_checked",
    "config.data.max_corrupt",
    # A sweep grows: each of its points has a config, and a folder, of its own.
    "config.candidates.*",
    "config.sweep.seeds",
    "config.sweep.controls",
    "config.sweep.random.num_points",  # the first points stay
)
# Keys whose values are paths; `config.json` has them in absolute form, so that it means the same everywhere.
PATHS = ("*release", "*.tokenizer", "*.teacher", "*.train_path", "*.evaluation_path", "*.mixture.*.path")

_log = logging.getLogger(__name__)


class Claim:
    """Use of a run's folder by one process, a context; nothing of a start that fails before `record` stays.

    Only heartbeats do where there are other processes, which learn from them that this one has failed.

    A local folder is locked by `flock` on a file in it, which ends with the process, however it ends. A bucket has no
    locks: there the newest process has the folder, and an older one that still runs is stopped by `confirm` at its next
    checkpoint. The same is done on a file system that does not lock. The primary process claims for all of its run.

    Args:
      workdir: local or `gs://`; created if missing.
      config: of the run, or of the sweep or evaluation, as a ConfigDict or a dict.
      init_from: None, or the absolute path of the parameters that the run starts from.
      last_stage: the stage whose `steps` may be raised, so that a finished run goes on.

    Raises:
      ConfigError: the folder is of another config or start, or of something else; the message lists the differences.
    """

    def __init__(
        self, workdir: epath.Path, config: RunConfig, *, init_from: str | None = None, last_stage: str | None = None
    ):
        self.workdir, self._path, self._last_stage = workdir, workdir / CONFIG_FILE, last_stage
        self._ours: Fields = _with_absolute_paths({**plain(config), INIT_FROM: init_from})
        self._confirm: Callable[[], None] = lambda: None
        self._check()

    @contextlib.contextmanager
    def held(self) -> Iterator["Claim"]:
        """Holds the folder inside the `with`.

        Raises:
          WorkdirInUse: another process has it.
          WorkdirError: it cannot be written.
          ConfigError: as the class.
        """
        if not is_primary():
            yield self
            return
        made, before = _missing_folders(self.workdir), _names(self.workdir)
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.workdir, error) from error
        try:
            with lock(self.workdir / LOCK_FILE) as self._confirm:
                self._check()  # another process may have started here since
                try:
                    yield self
                finally:
                    if not self._path.exists():
                        kept = {LOCK_FILE} | ({HEARTBEATS} if jax.process_count() > 1 else set())
                        _remove([self.workdir / name for name in EARLY if name not in before | kept])
        finally:
            for folder in made:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()

    def confirm(self) -> None:
        """Checks that no other process took the folder, where there are no locks.

        Raises:
          WorkdirInUse: another did.
        """
        if is_primary():
            self._confirm()

    def record(self) -> None:
        """Writes `config.json`: from here on the folder is this run's."""
        if not is_primary():
            return
        text = json.dumps(self._ours, indent=2) + "\n"
        if not self._path.exists():
            write_whole(self._path, text)
            return
        theirs = self._recorded()
        if changed := differences(theirs, self._ours):
            _log.warning("%s: changed since the last start:\n  %s", self._path, "\n  ".join(changed))
            if said := self._more_steps(theirs):
                _log.warning("%s", said)
            write_whole(self._path, text)

    def _recorded(self) -> Fields:
        try:
            return read_json(self._path, ConfigError)
        except ConfigError as error:
            raise ConfigError(
                f"{error}. The file has to be that of the run's start; put it back, or use another --workdir"
            ) from error

    def _check(self) -> None:
        if not is_primary():
            return
        if not self._path.exists():
            _check_unused(self.workdir)
            return
        theirs, ours = self._recorded(), self._ours
        if theirs.get(INIT_FROM) != ours[INIT_FROM]:
            raise ConfigError(
                f"{self.workdir}: this run started from {_start(theirs.get(INIT_FROM))}, and --init_from is now "
                f"{_start(ours[INIT_FROM])}; use another --workdir, or the original --init_from"
            )
        lines = differences(self._without_free(theirs, theirs), self._without_free(ours, theirs))
        if lines:
            raise ConfigError(
                f"{self.workdir} was created with another config; use another --workdir, or the original config. "
                "In the folder (here) and in this run (there):\n  " + "\n  ".join(lines)
            )

    def _without_free(self, given: Fields, theirs: Fields) -> Fields:
        """A config without the keys that may have another value than in the folder."""
        kept = _without(given, "config", FREE)
        if self._more_steps(theirs):
            for key in ("steps", "warmup_steps"):  # a first run chooses the warm-up by the number of steps
                kept["stages"][self._last_stage].pop(key, None)
        return kept

    def _more_steps(self, theirs: Fields) -> str:
        """What is said where the last stage has more steps than in the folder; else empty."""
        old, new = (_steps(config, self._last_stage) for config in (theirs, self._ours))
        if old is None or new is None or new <= old:
            return ""
        return (
            f"stage {self._last_stage} goes on to {new} steps: learning rates of the steps that are left are those of "
            f"a schedule of {new} steps, those so far were of {old}"
        )


def _start(init_from: str | None) -> str:
    return "its own first parameters (no --init_from)" if init_from is None else init_from


def _steps(config: Fields, stage: str | None) -> int | None:
    stages = config.get("stages", {})
    return stages[stage].get("steps") if stage in stages else None


def _without(value: Tree, path: str, patterns: tuple[str, ...]) -> Tree:
    """A plain config without the keys whose path matches a pattern."""
    if not isinstance(value, dict):
        return value
    kept = {key: item for key, item in value.items() if not _matches(f"{path}.{key}", patterns)}
    return {key: _without(item, f"{path}.{key}", patterns) for key, item in kept.items()}


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _with_absolute_paths(value: Tree, path: str = "config") -> Tree:
    if isinstance(value, dict):
        return {key: _with_absolute_paths(item, f"{path}.{key}") for key, item in value.items()}
    if not isinstance(value, str) or not _matches(path, PATHS):
        return value
    local = value.startswith("~") or "*" in value or os.path.exists(value)  # else a name of the hub, or a kind
    return absolute(value) if local else value


def _check_unused(workdir: epath.Path) -> None:
    """Raises if a folder without a config has files that a run could overwrite; log files are allowed."""
    if not workdir.exists():
        return
    if not workdir.is_dir():
        raise ConfigError(f"{workdir}: expected a folder, found a file; use another --workdir")

    def is_obstacle(entry: epath.Path) -> bool:
        if entry.name == CHECKPOINTS:  # empty after a start that was killed
            return not entry.is_dir() or any(one.name.isdigit() for one in entry.iterdir())
        if entry.name == METRICS_FILE:
            return entry.stat().length > 0
        return entry.name not in EARLY and entry.is_dir()

    found = sorted(entry.name for entry in workdir.iterdir() if is_obstacle(entry))
    if found:
        raise ConfigError(
            f"{workdir} has {', '.join(found[:3])} and no {CONFIG_FILE}, so it is not a run's folder; use another "
            "--workdir"
        )


def _names(folder: epath.Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.exists() else set()


def _missing_folders(folder: epath.Path) -> list[epath.Path]:
    """The folder and its parents that do not exist, innermost first; a bucket has none."""
    if is_remote(folder):
        return []
    return [one for one in (folder, *folder.parents) if not one.exists()]


def _remove(paths: list[epath.Path]) -> None:
    for path in paths:
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)

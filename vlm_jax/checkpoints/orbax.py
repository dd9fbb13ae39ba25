"""A run's checkpoints: parameters, optimizer and input position, saved by Orbax in the background."""

import errno
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from vlm_jax.checkpoints.checksums import array_checksums, differing, list_files, sealed
from vlm_jax.checkpoints.verification import (
    ARRAYS,
    POSITION,
    STATE,
    CheckpointError,
    Checksums,
    DamagedCheckpoint,
    checked,
    damage_of,
    damaged,
    described_by,
    failed_anywhere,
    few,
    first_line,
    named,
    other_shapes,
    unread_elsewhere,
    unreadable,
)
from vlm_jax.paths import absolute
from vlm_jax.types import Fields, Tree

CHECKPOINTS = "checkpoints"  # the folder in a workdir
METADATA_BYTES = 256 * 1024  # upper estimate of what Orbax writes in addition to the arrays

_log = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """A checkpoint that was read: its number, the state, and the position of the input."""

    step: int
    state: Tree
    position: Fields


class _ListedHandler(ocp.StandardCheckpointHandler):
    """Writes the list of an item's files before the checkpoint gets its name."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        list_files(directory)


@ocp.args.register_with_handler(_ListedHandler, for_save=True)
class _ListedSave(ocp.args.StandardSave):
    pass


@ocp.args.register_with_handler(_ListedHandler, for_restore=True)
class _ListedRestore(ocp.args.StandardRestore):
    pass


class _One(managers.PreservationPolicy):
    """Keeps one checkpoint. Not Orbax's `BestN`: a checkpoint is written before it is evaluated."""

    def __init__(self, number: Callable[[], int | None]):
        self._number = number

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        number = self._number()
        return [one.step == number for one in checkpoints]


class RunCheckpoints:
    """The numbered checkpoints of one workdir.

    Saving returns immediately and continues in the background; a checkpoint appears under its number
    only when it is complete, so a killed run keeps the previous one. A checkpoint has the checksums of its arrays and
    of its position, and a list of its files; each read compares them.

    Args:
      directory: parent of the numbered folders, local or `gs://`; created when missing.
      keep: number of newest checkpoints to keep.
      keep_every: also keeps those whose number is a multiple of it; None for none.
      best: the number of one that is kept as well, asked whenever others are removed.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        keep: int,
        keep_every: int | None = None,
        best: Callable[[], int | None] = lambda: None,
    ):
        self.directory = absolute_folder(directory)
        kept = [managers.LatestN(keep), _One(best)]
        kept += [] if keep_every is None else [managers.EveryNSteps(keep_every)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(kept), create=True, enable_async_checkpointing=True
        )
        handlers: Any = {STATE: _ListedHandler(), POSITION: ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """Number of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def complete(self) -> list[int]:
        """Numbers of the complete checkpoints that are there now."""
        return [step for step in self._manager.all_steps() if (self.directory / str(step)).exists()]

    def save(self, step: int, state: Tree, position: Fields) -> None:
        """Starts saving.

        Args:
          step: the checkpoint's number.
          state: a pytree of arrays.
          position: state of the input iterator, as JSON types.

        Raises:
          CheckpointError: this save or the previous one failed (no space, no permission).
        """
        described = sealed({POSITION: position, ARRAYS: array_checksums(named(state))})
        args = ocp.args.Composite(state=_ListedSave(state), position=ocp.args.JsonSave(described))
        with self._failures(f"saving checkpoint {step}"):
            self._manager.wait_until_finished()  # of the previous save, whose space is then used
            self._check_space(state)
            self._manager.save(step, args=args)

    def _check_space(self, state: Tree) -> None:
        """Checks the free space of a local disk before writing."""
        if "://" in str(self.directory):
            return
        leaves = [leaf for leaf in jax.tree.leaves(state) if hasattr(leaf, "nbytes")]
        needed = sum(leaf.nbytes for leaf in leaves) * 5 // 4 + METADATA_BYTES
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"no space left: a checkpoint needs about {needed:,} bytes, {free:,} are free")

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          CheckpointError: the save in progress failed.
        """
        with self._failures("saving a checkpoint"):
            self._manager.wait_until_finished()

    def newest(self, like: Callable[[int], Tree]) -> Resumed | None:
        """Reads the newest checkpoint that is not damaged, and says which others are.

        The folders of damaged ones that are newer are renamed to `N.damaged`, or `N.damaged.1` and so on where that
        exists, and the run saves under their numbers.

        Args:
          like: given a checkpoint's number, the pytree of its state, as of `restore`.

        Returns:
          None where there is no checkpoint.

        Raises:
          CheckpointError: every checkpoint is damaged, or a damaged one cannot be renamed.
          Exception: of `restore`, where one that is not proven to be damaged cannot be read; nothing is renamed.
        """
        damaged: dict[int, str] = {}  # no errors: their tracebacks would keep the arrays that were read
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = Resumed(step, *self.restore(step, like(step)))
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
                continue
            except Exception:
                for reason in damaged.values():
                    _log.warning("%s", reason)
                raise
            for number, reason in damaged.items():
                self._set_aside(number, reason, step)
            return found
        if damaged:
            raise CheckpointError(
                f"{'; '.join(damaged.values())}. No other checkpoint is left; delete the folder {self.directory} and "
                "run the same command to start anew"
            )
        return None

    def _set_aside(self, number: int, reason: str, step: int) -> None:
        folder, problem = self.directory / str(number), None
        if jax.process_index() == 0:
            try:
                aside = _first_free(folder.with_name(f"{number}.damaged"))
                folder.rename(aside)
                _log.warning(
                    "%s. The run resumes from checkpoint %d; %s is kept as %s", reason, step, folder, aside.name
                )
            except Exception as error:  # a store's errors are of many types, and the other processes wait
                problem = error
        if failed_anywhere(problem is not None):
            told = "the first process names the cause" if problem is None else first_line(problem)
            raise CheckpointError(
                f"{reason}. {folder} cannot be renamed ({told}); fix the permissions and run the same command to "
                f"resume from checkpoint {step}"
            ) from problem
        self._manager.reload()

    def is_whole(self, step: int) -> bool:
        """Whether the files of a checkpoint are as they were written; all processes call this alike.

        Values in large files, which have no checksum of their own, are not read.

        Raises:
          CheckpointError: it cannot be read here.
        """
        return checked(self.directory / str(step))[0] is None

    def restore(self, step: int, like: Tree) -> tuple[Tree, Fields]:
        """Reads one checkpoint, every array directly to its sharding, and compares its checksums.

        Args:
          step: its number.
          like: a pytree of `jax.ShapeDtypeStruct` with shardings.

        Returns:
          The state and the position.

        Raises:
          DamagedCheckpoint: a file, or a value, is not as it was written.
          CheckpointError: it is of another model, a file cannot be opened, or another process cannot read it.
          Exception: any other failure of reading it here, such as a full memory, with a note that names the checkpoint.
        """
        folder = self.directory / str(step)
        state, position, expected = None, {}, None
        damage: str | None = None
        failure: Exception | None = None
        try:
            position, expected = described_by(folder)
            # Without the checkpointer, whose barrier a process that fails would not reach.
            state = ocp.StandardCheckpointHandler().restore(folder / STATE, args=ocp.args.StandardRestore(like))
        except Exception as error:  # Orbax and TensorStore raise many types
            if lines := [] if expected is None else list(other_shapes(expected, like)):
                failure = CheckpointError(f"checkpoint {step} in {self.directory} is of another model: {few(lines)}")
            elif (damage := damage_of(error)) is None:
                failure = unreadable(folder, error)
        if not failed_anywhere(damage is not None or failure is not None):
            lines = [] if expected is None else list(differing(expected, array_checksums(named(state))))
            damage = few(lines) if lines else None
        if failed_anywhere(damage is not None):
            state = None  # frees its memory, into which an older checkpoint is read
            reason = "another process finds the damage" if damage is None else damage
            raise DamagedCheckpoint(f"checkpoint {step} in {self.directory} is damaged: {reason}")
        if failed_anywhere(failure is not None):
            state = None
            raise failure or unread_elsewhere(folder)
        return state, position

    def close(self) -> None:
        """Waits, then stops the background threads."""
        self.wait()
        self._manager.close()

    def _failures(self, action: str) -> "_SaveFailures":
        return _SaveFailures(self, action)


class _SaveFailures:
    """Converts any failure of Orbax inside a `with` to a CheckpointError."""

    def __init__(self, checkpoints: RunCheckpoints, action: str):
        self._checkpoints, self._action = checkpoints, action

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> None:
        if not isinstance(error, Exception):
            return
        directory = self._checkpoints.directory
        if not directory.exists():
            raise CheckpointError(
                f"{self._action} in {directory} failed: the folder was removed under the run; run the same command to "
                "start anew"
            ) from error
        steps = self._checkpoints.complete()
        kept = f"checkpoint {max(steps)} is complete" if steps else "no checkpoint is left"
        raise CheckpointError(
            f"{self._action} in {directory} failed: {first_line(error)}. {kept}; free space or "
            "fix the permissions, and rerun the same command to resume"
        ) from error


def absolute_folder(directory: epath.PathLike) -> epath.Path:
    """The absolute path, as Orbax requires."""
    return epath.Path(absolute(directory))


def parts_directory(source: epath.PathLike) -> str:
    """The absolute path that `read_parts` takes: of a run's workdir, its folder of checkpoints."""
    folder = epath.Path(absolute(source))
    return os.fspath(folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder)


def newest_state(directory: epath.PathLike) -> epath.Path:
    """The folder of the arrays of a run's newest complete checkpoint.

    Args:
      directory: that run's checkpoint directory, or one of the checkpoints in it, which is then the one that is read.

    Raises:
      CheckpointError: there is no checkpoint.
    """
    directory = absolute_folder(directory)
    if (directory / STATE).is_dir():
        return directory / STATE
    step = None
    if directory.exists():
        with ocp.CheckpointManager(directory) as manager:
            step = manager.latest_step()
    if step is None:
        raise CheckpointError(f"no complete checkpoint in {directory}; train that run to its end first")
    return directory / str(step) / STATE


def newest_arrays(directory: epath.PathLike) -> tuple[epath.Path, Checksums | None]:
    """As `newest_state`, with the checksums of the arrays, after comparing those of the files.

    Raises:
      CheckpointError: there is no checkpoint, or it is damaged.
    """
    state = newest_state(directory)
    reason, checksums = checked(state.parent)
    if reason is not None:
        raise damaged(state, reason)
    return state, checksums


def _first_free(path: epath.Path) -> epath.Path:
    """The path, or the first of it with `.1`, `.2` and so on that does not exist."""
    names = itertools.chain([path.name], (f"{path.name}.{i}" for i in itertools.count(1)))
    return next(other for other in map(path.with_name, names) if not other.exists())

"""A run's checkpoints: parameters, optimizer and input position, saved by Orbax in the background."""

import errno
import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from vlm_jax.checkpoints.checksums import (
    FILES,
    DamagedFile,
    array_checksums,
    check_files,
    differing,
    list_files,
    read_object,
    sealed,
    unsealed,
)
from vlm_jax.paths import absolute
from vlm_jax.types import Fields, Tree

CHECKPOINTS = "checkpoints"  # the folder in a workdir
METADATA_BYTES = 256 * 1024  # upper estimate of what Orbax writes in addition to the arrays
STATE, POSITION = "state", "position"  # folders of a checkpoint
ARRAYS = "arrays"  # key of the checksums of a checkpoint's arrays, beside its position

Checksums = Mapping[str, str]  # by path; see `checksums.array_checksums`

# What TensorStore and Orbax say of bytes that are not those that were written; not of a full memory, a failed request
# or a lack of rights.
_NOT_AS_WRITTEN = re.compile(
    r"Error decoding (?:b-tree node|manifest|version tree node)|ZSTD_decompressStream\(\) failed: (?!Allocation error)|"
    r"Truncated Zstd-compressed stream|Uncompressed chunk is \d+ bytes|Not enough data: expected|End of data expected|"
    r"/\.zarray\" in OCDBT database at .*: (?:Error parsing|Invalid JSON)|is not compatible with the stored shape"
)

_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names it and the fix."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files or values are proven to be other than those that were written."""


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


class RunCheckpoints:
    """The numbered checkpoints of one workdir.

    Saving returns immediately and continues in the background; a checkpoint appears under its number
    only when it is complete, so a killed run keeps the previous one. A checkpoint has the checksums of its arrays and
    of its position, and a list of its files; each read compares them.

    Args:
      directory: parent of the numbered folders, local or `gs://`; created when missing.
      keep: number of newest checkpoints to keep.
      keep_every: also keeps those whose number is a multiple of it; None for none.
    """

    def __init__(self, directory: epath.PathLike, keep: int, keep_every: int | None = None):
        self.directory = absolute_folder(directory)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every, create=True, enable_async_checkpointing=True
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
        described = sealed({POSITION: position, ARRAYS: array_checksums(_named(state))})
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
        if _failed_anywhere(problem is not None):
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
        return _checked(self.directory / str(step))[0] is None

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
            if lines := [] if expected is None else list(_other_shapes(expected, like)):
                failure = CheckpointError(f"checkpoint {step} in {self.directory} is of another model: {few(lines)}")
            elif (damage := _damage(error)) is None:
                failure = _unreadable(folder, error)
        if not _failed_anywhere(damage is not None or failure is not None):
            lines = [] if expected is None else list(differing(expected, array_checksums(_named(state))))
            damage = few(lines) if lines else None
        if _failed_anywhere(damage is not None):
            state = None  # frees its memory, into which an older checkpoint is read
            reason = "another process finds the damage" if damage is None else damage
            raise DamagedCheckpoint(f"checkpoint {step} in {self.directory} is damaged: {reason}")
        if _failed_anywhere(failure is not None):
            state = None
            raise failure or _unread_elsewhere(folder)
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


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:1000]}"


def parts_directory(source: epath.PathLike) -> str:
    """The absolute path that `read_parts` takes: of a run's workdir, its folder of checkpoints."""
    folder = epath.Path(absolute(source))
    return os.fspath(folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder)


def newest_state(directory: epath.PathLike) -> epath.Path:
    """The folder of the arrays of a run's newest complete checkpoint.

    Args:
      directory: that run's checkpoint directory.

    Raises:
      CheckpointError: there is no checkpoint.
    """
    directory = absolute_folder(directory)
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
    reason, checksums = _checked(state.parent)
    if reason is not None:
        raise damaged(state, reason)
    return state, checksums


def _checked(folder: epath.Path) -> tuple[str | None, Checksums | None]:
    """What is damaged of a checkpoint's files, or None, and the checksums of its arrays; all processes call this alike.

    Raises:
      CheckpointError: a file cannot be read here.
      Exception: as `_unreadable`.
    """
    reason, checksums = None, None
    failure: Exception | None = None
    try:
        checksums = described_by(folder)[1]
    except DamagedFile as error:
        reason = str(error)
    except Exception as error:  # a store's errors are of many types, and the other processes wait
        failure = _unreadable(folder, error)
    if _failed_anywhere(reason is not None):  # the first process alone compares the files
        return reason or "the first process names the file", None
    if _failed_anywhere(failure is not None):
        raise failure or _unread_elsewhere(folder)
    return None, checksums


def _damage(error: BaseException) -> str | None:
    """What is damaged, where an error or a cause of it proves that; else None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DamagedFile):
            return str(cause)
        if _NOT_AS_WRITTEN.search(str(cause)):
            return first_line(cause)
        cause = cause.__cause__
    return None


def _unreadable(folder: epath.Path, error: Exception) -> Exception:
    """The error of a checkpoint that cannot be read here, though nothing proves that it is damaged.

    Args:
      folder: of the checkpoint.
      error: what reading it raised.

    Returns:
      A CheckpointError of an OSError; any other error itself, with a note.
    """
    told = f"checkpoint {folder.name} in {folder.parent} cannot be read here: {first_line(error)}; it is left as it is"
    if not isinstance(error, OSError):
        error.add_note(told)
        return error
    found = CheckpointError(told)
    found.__cause__ = error
    return found


def _unread_elsewhere(folder: epath.Path) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder.name} in {folder.parent} cannot be read by another process")


def _other_shapes(expected: Checksums, like: Tree) -> Iterator[str]:
    """Lines about the arrays that only a state or only a checkpoint has, or that have another shape."""
    stored = {name: text.partition(" ")[2].rpartition(" ")[0] for name, text in expected.items()}
    wanted = {name: str(tuple(leaf.shape)) for name, leaf in _named(like).items()}
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            yield f"{name}: expected {wanted.get(name, 'no such array')}, found {stored.get(name, 'none')}"


def described_by(folder: epath.Path) -> tuple[Fields, Checksums | None]:
    """The position of a checkpoint and the checksums of its arrays, after comparing the files with their list.

    Args:
      folder: of the checkpoint.

    Returns:
      The position, and the checksums by path, or None for a checkpoint of an earlier version, which has none.

    Raises:
      DamagedFile: it is damaged; the message names the file.
      OSError: a file cannot be read.
    """
    path = folder / POSITION / "metadata"
    content = read_object(path)
    if jax.process_index() == 0:  # files are read once for all hosts
        read_object(folder / "_CHECKPOINT_METADATA")
    if isinstance(content, dict) and content.keys() <= {"batch"} and not (folder / STATE / FILES).exists():
        _log.warning("%s is of an earlier version, without checksums: what is read is not verified", folder)
        return content, None
    described = unsealed(content, path)
    if jax.process_index() == 0:
        check_files(folder / STATE)
    return described[POSITION], described[ARRAYS]


def damaged(state: epath.Path, reason: str) -> CheckpointError:
    """The error of a checkpoint of another run that cannot be used.

    Args:
      state: the folder of its arrays.
      reason: what differs.
    """
    folder = state.parent
    return CheckpointError(
        f"{folder} is damaged: {reason}. Rename the folder to {folder.name}.damaged to read the checkpoint before it, "
        "if there is one"
    )


def _named(tree: Tree) -> dict[str, Tree]:
    """Leaves by path, as in `stored_shapes`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _failed_anywhere(failed: bool) -> bool:
    """Whether any process has failed; all processes call this alike."""
    if jax.process_count() == 1:
        return failed
    return bool(np.any(multihost_utils.process_allgather(np.asarray(failed))))


def _first_free(path: epath.Path) -> epath.Path:
    """The path, or the first of it with `.1`, `.2` and so on that does not exist."""
    names = itertools.chain([path.name], (f"{path.name}.{i}" for i in itertools.count(1)))
    return next(other for other in map(path.with_name, names) if not other.exists())


def few(lines: list[str]) -> str:
    """The first lines of many."""
    more = [f"and {len(lines) - 4} more"] if len(lines) > 4 else []
    return "; ".join([*lines[:4], *more])


def stored_shapes(state: epath.PathLike) -> dict[str, tuple[int, ...]]:
    """Shapes of stored arrays by path, separated by `/`, without reading them.

    Raises:
      CheckpointError: the folder cannot be read.
    """
    return {path: tuple(leaf.shape or ()) for path, leaf in _metadata(state).items()}


def stored_dtypes(state: epath.PathLike) -> dict[str, np.dtype]:
    """Dtypes of stored arrays, as `stored_shapes`."""
    return {path: np.dtype(leaf.dtype) for path, leaf in _metadata(state).items()}


def _metadata(state: epath.PathLike) -> dict[str, Any]:
    try:
        return _named(ocp.PyTreeCheckpointHandler().metadata(epath.Path(state)).tree)
    except Exception as error:
        raise CheckpointError(f"{state} cannot be read: {first_line(error)}") from error


def check_stored(state: epath.PathLike, wanted: Mapping[str, tuple[int, ...]], roots: Iterable[str]) -> None:
    """Checks, without reading them, that the stored arrays are exactly those of a model.

    Args:
      state: the folder of the arrays.
      wanted: shapes by path, separated by `/`.
      roots: path prefixes under which no other arrays are allowed.

    Raises:
      CheckpointError: arrays are missing, unexpected or of another shape; the message names them.
    """
    found = stored_shapes(state)
    below = tuple(f"{root}/" for root in roots)
    problems = [f"it lacks {path} {shape}" for path, shape in wanted.items() if path not in found]
    problems += [
        f"it has {path} {shape}, which the model does not have"
        for path, shape in found.items()
        if path.startswith(below) and path not in wanted
    ]
    problems += [
        f"it has {path} {found[path]}, expected {shape}"
        for path, shape in wanted.items()
        if path in found and found[path] != shape
    ]
    if problems:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise CheckpointError(f"{state} is of another model:\n  " + "\n  ".join([*problems[:8], *more]))

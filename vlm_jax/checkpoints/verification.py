"""What proves that a checkpoint of a run is damaged, or of another model, and what is said of it."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from vlm_jax.checkpoints.checksums import FILES, DamagedFile, check_files, read_object, unsealed
from vlm_jax.types import Fields, Tree

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


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:1000]}"


def checked(folder: epath.Path) -> tuple[str | None, Checksums | None]:
    """What is damaged of a checkpoint's files, or None, and the checksums of its arrays; all processes call this alike.

    Raises:
      CheckpointError: a file cannot be read here.
      Exception: as `unreadable`.
    """
    reason, checksums = None, None
    failure: Exception | None = None
    try:
        checksums = described_by(folder)[1]
    except DamagedFile as error:
        reason = str(error)
    except Exception as error:  # a store's errors are of many types, and the other processes wait
        failure = unreadable(folder, error)
    if failed_anywhere(reason is not None):  # the first process alone compares the files
        return reason or "the first process names the file", None
    if failed_anywhere(failure is not None):
        raise failure or unread_elsewhere(folder)
    return None, checksums


def damage_of(error: BaseException) -> str | None:
    """What is damaged, where an error or a cause of it proves that; else None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DamagedFile):
            return str(cause)
        if _NOT_AS_WRITTEN.search(str(cause)):
            return first_line(cause)
        cause = cause.__cause__
    return None


def unreadable(folder: epath.Path, error: Exception) -> Exception:
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


def unread_elsewhere(folder: epath.Path) -> CheckpointError:
    """The error of a checkpoint that another process cannot read."""
    return CheckpointError(f"checkpoint {folder.name} in {folder.parent} cannot be read by another process")


def other_shapes(expected: Checksums, like: Tree) -> Iterator[str]:
    """Lines about the arrays that only a state or only a checkpoint has, or that have another shape."""
    stored = {name: text.partition(" ")[2].rpartition(" ")[0] for name, text in expected.items()}
    wanted = {name: str(tuple(leaf.shape)) for name, leaf in named(like).items()}
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


def named(tree: Tree) -> dict[str, Tree]:
    """Leaves by path, as in `stored_shapes`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def failed_anywhere(failed: bool) -> bool:
    """Whether any process has failed; all processes call this alike."""
    if jax.process_count() == 1:
        return failed
    return bool(np.any(multihost_utils.process_allgather(np.asarray(failed))))


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
        return named(ocp.PyTreeCheckpointHandler().metadata(epath.Path(state)).tree)
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

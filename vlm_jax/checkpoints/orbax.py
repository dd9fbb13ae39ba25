"""A run's checkpoints: parameters, optimizer and input position, saved by Orbax in the background."""

import errno
import os
import shutil
from collections.abc import Iterable, Mapping

import jax
import orbax.checkpoint as ocp
from etils import epath

from vlm_jax.paths import absolute
from vlm_jax.types import Fields, Tree

CHECKPOINTS = "checkpoints"  # the folder in a workdir
METADATA_BYTES = 256 * 1024  # upper estimate of what Orbax writes in addition to the arrays


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names it and the fix."""


class RunCheckpoints:
    """The numbered checkpoints of one workdir.

    Saving returns immediately and continues in the background; a checkpoint appears under its number
    only when it is complete, so a killed run keeps the previous one.

    Args:
      directory: parent of the numbered folders, local or `gs://`; created when missing.
      keep: number of newest checkpoints to keep.
    """

    def __init__(self, directory: epath.PathLike, keep: int):
        self.directory = absolute_folder(directory)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """Number of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree, position: Fields) -> None:
        """Starts saving.

        Args:
          step: the checkpoint's number.
          state: a pytree of arrays.
          position: state of the input iterator, as JSON types.

        Raises:
          CheckpointError: this save or the previous one failed (no space, no permission).
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
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

    def restore(self, step: int, like: Tree) -> tuple[Tree, Fields]:
        """Reads one checkpoint, every array directly to its sharding.

        Args:
          step: its number.
          like: a pytree of `jax.ShapeDtypeStruct` with shardings.

        Returns:
          The state and the position.

        Raises:
          CheckpointError: it is damaged or has other shapes.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
            older = [s for s in self._manager.all_steps() if s < step]
            way_on = f"the run then resumes from checkpoint {max(older)}" if older else "the run then restarts"
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} cannot be read: it is damaged or of another model. Delete "
                f"the folder {self.directory / str(step)} and run the same command; {way_on}. "
                f"Reported: {first_line(error)}"
            ) from error
        return restored["state"], restored["position"]

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
        latest = self._checkpoints.latest()
        kept = "no checkpoint is left" if latest is None else f"checkpoint {latest} is complete"
        raise CheckpointError(
            f"{self._action} in {self._checkpoints.directory} failed: {first_line(error)}. {kept}; free space or "
            f"fix the permissions, and rerun the same command to resume"
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
    return directory / str(step) / "state"


def stored_shapes(state: epath.PathLike) -> dict[str, tuple[int, ...]]:
    """Shapes of stored arrays by path, separated by `/`, without reading them.

    Raises:
      CheckpointError: the folder cannot be read.
    """
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(state)).tree
    except Exception as error:
        raise CheckpointError(f"{state} cannot be read: {first_line(error)}") from error
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape or ()) for path, leaf in leaves}


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

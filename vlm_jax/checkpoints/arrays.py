"""Trees of arrays as Orbax checkpoints, written and read an array at a time.

Whatever reads Orbax reads these too: they are what its `PyTreeCheckpointHandler` writes, with the axes
that stack layers cut into chunks, so that one layer can be read by itself.
"""

import errno
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from vlm_jax.checkpoints.hub import CheckpointFileError, LazyTensor
from vlm_jax.checkpoints.ops import Shape
from vlm_jax.checkpoints.orbax import METADATA_BYTES

CHUNK_BYTES = 64 * 2**20  # the most of a chunk, which is written and read whole


class _OneAtATime(ocp.type_handlers.NumpyHandler):
    """Reads a `LazyTensor` when the one before it is on disk."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[ocp.SaveArgs] | None = None
    ) -> Sequence[Any]:
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            (writing,) = await super().serialize([np.asarray(value)], [info], [arg])
            writing.result()
        return ()


def save_arrays(directory: epath.PathLike, tensors: Mapping[str, LazyTensor], num_stacked: Mapping[str, int]) -> None:
    """Writes tensors as one Orbax checkpoint; on the host there is never more than one of them.

    Args:
      directory: absolute, local or `gs://`; not there yet.
      tensors: by their paths in the tree, parts separated by `/`; none without elements.
      num_stacked: how many leading axes of each are stacks, which are stored entry by entry.

    Raises:
      OSError: there is no space for them on a local disk, and nothing has been written; or a write failed.
    """
    check_space(directory, sum(tensor.nbytes for tensor in tensors.values()) + METADATA_BYTES)
    arguments = {
        path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(num_stacked[path]))) for path in tensors
    }
    kinds = ((LazyTensor, _OneAtATime()), (jax.Array, ocp.type_handlers.ArrayHandler()))
    registry = ocp.type_handlers.create_type_handler_registry(*kinds)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=True, use_zarr3=False)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(directory, args=ocp.args.PyTreeSave(_tree(tensors), save_args=_tree(arguments)))
    except ValueError as error:  # what TensorStore raises where the system does not let it write
        if isinstance(error, CheckpointFileError):
            raise
        raise OSError(f"{directory} cannot be written ({_first_line(error)})") from error


def check_space(path: epath.PathLike, num_bytes: int) -> None:
    """Refuses before anything is written what cannot fit on a local disk.

    Raises:
      OSError: it does not fit.
    """
    if "://" in str(path):
        return
    there = next(folder for folder in epath.Path(path).parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"no space left: {path} needs about {num_bytes:,} bytes, {free:,} are free")


def open_arrays(directory: epath.PathLike, shapes: Mapping[str, Shape]) -> dict[str, LazyTensor]:
    """The arrays of an Orbax checkpoint by their paths, parts separated by `/`; none of them is read yet.

    Args:
      directory: absolute, local or `gs://`.
      shapes: of every array that is wanted, by its path; there may be others.

    Raises:
      CheckpointFileError: there is no checkpoint, or not these arrays; or, when one is read, it is damaged.
    """
    if not (epath.Path(directory) / "_METADATA").exists():
        raise CheckpointFileError(f"{directory}: no whole Orbax checkpoint; write it again")
    folder = str(directory)
    base = folder if "://" in folder else {"driver": "file", "path": f"{folder}/"}
    names = {path: path.replace("/", ".") for path in shapes}
    opening = {
        path: ts.open(
            {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}, open=True, read=True
        )
        for path, name in names.items()
    }
    found = {path: _explained(opened.result, names[path], directory) for path, opened in opening.items()}
    if wrong := [
        f"{names[path]} {x.shape}, not {shapes[path]}" for path, x in found.items() if x.shape != shapes[path]
    ]:
        raise CheckpointFileError(f"{directory} is of another model: it holds {'; '.join(wrong[:8])}")
    return {
        path: LazyTensor(x.shape, x.dtype.numpy_dtype, _reader(x, names[path], directory)) for path, x in found.items()
    }


def _reader(stored: Any, name: str, directory: epath.PathLike) -> Callable[[Any], np.ndarray]:
    return lambda index: _explained(stored[index].read().result, name, directory)


def _explained(result: Callable[[], Any], name: str, directory: epath.PathLike) -> Any:
    """What TensorStore gives; its errors, of files and of data, as a CheckpointFileError."""
    try:
        return result()
    except (ValueError, OSError) as error:
        raise CheckpointFileError(
            f"{name} in {directory} cannot be read ({_first_line(error)}); write it again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:500]


def _tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of what is given by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree

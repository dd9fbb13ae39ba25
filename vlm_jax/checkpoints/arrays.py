"""Trees of arrays as Orbax checkpoints, written and read one array at a time.

The format is that of Orbax's `PyTreeCheckpointHandler`, with the stacked layer axes
chunked, so that a single layer can be read.
"""

import errno
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax.traverse_util import unflatten_dict

from vlm_jax.checkpoints.hub import CheckpointFileError, LazyTensor
from vlm_jax.checkpoints.ops import Shape
from vlm_jax.checkpoints.orbax import METADATA_BYTES
from vlm_jax.types import Selection, Tree

CHUNK_BYTES = 64 * 2**20  # maximum size of a chunk, which is written and read whole
Read = TypeVar("Read")


class _OneAtATime(ocp.type_handlers.NumpyHandler):
    """Reads a `LazyTensor` once the previous one is on disk."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(
        self, values: Sequence[Tree], infos: Sequence[Tree], args: Sequence[ocp.SaveArgs] | None = None
    ) -> Sequence[Tree]:
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            (writing,) = await super().serialize([np.asarray(value)], [info], [arg])
            writing.result()
        return ()


def save_arrays(directory: epath.PathLike, tensors: Mapping[str, LazyTensor], num_stacked: Mapping[str, int]) -> None:
    """Writes tensors as one Orbax checkpoint; at most one of them is in host memory at a time.

    Args:
      directory: absolute, local or `gs://`; must not exist.
      tensors: by their paths in the tree, separated by `/`; none may be empty.
      num_stacked: number of leading stacked axes of each, which are stored entry by entry.

    Raises:
      OSError: a local disk has too little free space, before anything is written; or a write failed.
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
            checkpointer.save(
                directory,
                args=ocp.args.PyTreeSave(
                    unflatten_dict(tensors, sep="/"), save_args=unflatten_dict(arguments, sep="/")
                ),
            )
    except ValueError as error:  # raised by TensorStore where writing is not permitted
        if isinstance(error, CheckpointFileError):
            raise
        raise OSError(f"{directory} cannot be written ({_first_line(error)})") from error


def check_space(path: epath.PathLike, num_bytes: int) -> None:
    """Checks the free space of a local disk before writing.

    Raises:
      OSError: fewer than `num_bytes` are free.
    """
    if "://" in str(path):
        return
    there = next(folder for folder in epath.Path(path).parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"no space left: {path} needs about {num_bytes:,} bytes, {free:,} are free")


def open_arrays(directory: epath.PathLike, shapes: Mapping[str, Shape]) -> dict[str, LazyTensor]:
    """The arrays of an Orbax checkpoint by their paths, separated by `/`, without reading them.

    Args:
      directory: absolute, local or `gs://`.
      shapes: of every requested array, by its path; the checkpoint may have others.

    Raises:
      CheckpointFileError: there is no checkpoint, or it lacks these arrays; or, when one is read, it is damaged.
    """
    if not (epath.Path(directory) / "_METADATA").exists():
        raise CheckpointFileError(f"{directory}: not a complete Orbax checkpoint; write it again")
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
        raise CheckpointFileError(f"{directory} is of another model: it has {'; '.join(wrong[:8])}")
    return {
        path: LazyTensor(x.shape, x.dtype.numpy_dtype, _reader(x, names[path], directory)) for path, x in found.items()
    }


def _reader(stored: Tree, name: str, directory: epath.PathLike) -> Callable[[Selection], np.ndarray]:
    return lambda index: _explained(stored[index].read().result, name, directory)


def _explained(result: Callable[[], Read], name: str, directory: epath.PathLike) -> Read:
    """The result of TensorStore, with its errors as CheckpointFileErrors."""
    try:
        return result()
    except (ValueError, OSError) as error:
        raise CheckpointFileError(
            f"{name} in {directory} cannot be read ({_first_line(error)}); write it again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:500]

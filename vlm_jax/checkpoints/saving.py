"""Writes released checkpoint files: safetensors, NumPy archives, and the files next to them."""

import contextlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors.numpy
from etils import epath

from vlm_jax.checkpoints.hub import (
    ARCHIVE_FILE,
    COMPANIONS,
    DTYPES,
    INDEX_FILE,
    MAP_FILE,
    SINGLE_FILE,
    CheckpointFileError,
)
from vlm_jax.paths import absolute, is_remote
from vlm_jax.types import Config

MAX_SHARD_BYTES = 5 * 2**30


def copy_companions(source: Path, folder: epath.PathLike) -> tuple[epath.Path, ...]:
    """Copies the files next to a checkpoint's weights, except its index; existing files are kept.

    Args:
      source: the folder of the checkpoint.
      folder: an existing folder, local or `gs://`.

    Returns:
      The files written.
    """
    folder = epath.Path(folder)
    found = sorted({path.relative_to(source) for pattern in COMPANIONS for path in source.glob(pattern)})
    companions = [name for name in found if name.name != MAP_FILE and not name.name.endswith(".index.json")]
    written = [name for name in companions if not (folder / name).exists()]
    for name in written:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((source / name).read_bytes())
    return tuple(folder / name for name in written)


def target_folder(folder: object) -> Path:
    """The local folder that a release is written to, with the home folder in place of a leading `~`.

    Raises:
      CheckpointFileError: not a path, none that a folder can have, or one in a bucket.
    """
    path = os.fspath(folder) if isinstance(folder, str | os.PathLike) else None
    if not isinstance(path, str) or not path.strip() or "\0" in path or is_remote(path):
        raise CheckpointFileError(
            f"expected the path of a local folder to write, got {folder!r}; pass one, as 'saved/1'"
        )
    return Path(absolute(path))


def check_vacant(folder: Path) -> None:
    """Checks that a folder does not contain a checkpoint of any format.

    Raises:
      CheckpointFileError: it contains one.
    """
    for name in (SINGLE_FILE, INDEX_FILE, ARCHIVE_FILE, MAP_FILE):
        if (folder / name).exists():
            raise CheckpointFileError(f"{folder / name} exists: write to another folder, or remove the old checkpoint")


def save_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Config,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> tuple[Path, ...]:
    """Writes tensors as `model.safetensors`, or as shards with an index above `max_shard_bytes`.

    Every file is written under a temporary name and renamed when all are complete, the index last: the
    folder contains the complete checkpoint or none.

    Args:
      folder: created if missing; it may contain other files, but no checkpoint.
      tensors: key -> NumPy or JAX array; copied to the host one shard at a time.
      max_shard_bytes: maximum size of a shard; a larger tensor gets its own shard.

    Returns:
      The files written.

    Raises:
      CheckpointFileError: the folder contains a checkpoint, or a tensor has a dtype that safetensors
        does not support. Nothing is written then.
    """
    folder = Path(folder)
    check_vacant(folder)
    writable = {np.dtype(dtype) for dtype in DTYPES.values()}
    if wrong := [f"{key} ({tensor.dtype})" for key, tensor in tensors.items() if tensor.dtype not in writable]:
        raise CheckpointFileError(f"{folder}: safetensors does not support {', '.join(wrong)}; cast to a numeric dtype")
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, max_shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with _renamed_when_complete(folder) as temporary:
        for name, keys in zip(names, shards, strict=True):
            shard = {key: np.asarray(tensors[key], order="C") for key in keys}
            safetensors.numpy.save_file(shard, temporary(name), metadata={"format": "pt"})
        if len(shards) > 1:
            weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
            total = sum(tensor.nbytes for tensor in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            temporary(INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
            names.append(INDEX_FILE)
    return tuple(folder / name for name in names)


def save_archive(folder: str | os.PathLike[str], tensors: Config) -> tuple[Path, ...]:
    """Writes tensors as `model.npz`, the file of vision_transformer and big_vision.

    Args:
      folder: created if missing; it may contain other files, but no checkpoint.
      tensors: key -> NumPy or JAX array.

    Returns:
      The files written.

    Raises:
      CheckpointFileError: the folder contains a checkpoint.
    """
    path = Path(folder) / ARCHIVE_FILE
    check_vacant(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not np.savez: a key may be named `file`.
    with (
        _renamed_when_complete(path.parent) as temporary,
        zipfile.ZipFile(temporary(path.name), "w") as archive,
    ):
        for key, tensor in tensors.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(tensor), allow_pickle=False)
    return (path,)


def _shards(tensors: Config, max_bytes: int) -> list[list[str]]:
    """Keys in order, split where the next tensor would exceed `max_bytes`."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    return shards


@contextlib.contextmanager
def _renamed_when_complete(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Provides temporary paths, and renames them in order on exit, or removes all on an error."""
    pending: dict[str, Path] = {}

    def temporary(name: str) -> Path:
        pending[name] = folder / f".{name}.{os.getpid()}.incomplete"
        return pending[name]

    renamed: list[Path] = []
    try:
        yield temporary
        for name, path in pending.items():
            os.replace(path, folder / name)
            renamed.append(folder / name)
    except BaseException:
        for path in (*pending.values(), *renamed):
            path.unlink(missing_ok=True)
        raise

"""Released checkpoint files: safetensors and NumPy archives, in and out.

Files are opened for their names, shapes and dtypes; a tensor is read when it is asked for, and of a
safetensors file only the slice that is asked for. Formats that run code when they are read (pickles:
`.bin`, `.pt`, pickled arrays) are refused.
"""

import contextlib
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vlm_jax.config import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ARCHIVE_FILE = "model.npz"
# Of a folder of Orbax arrays; see `checkpoints.mapped`.
MAP_FILE, PARAMS = "checkpoint_map.json", "params"
MAX_SHARD_BYTES = 5 * 2**30

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# What stands beside the weights: settings, and the files of tokenizers, chat templates and processors.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja")
_DOWNLOADED = ("*.safetensors", "*.npz", *_COMPANIONS)


class CheckpointFileError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and the fix."""


class LazyTensor:
    """A tensor still in its file; indexing reads it.

    Attributes:
      shape: of the whole tensor.
      dtype: as stored.
      by_rows: reading some rows costs no more than these; else it may cost the whole tensor.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[Any], np.ndarray], *, by_rows: bool = False):
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.by_rows = by_rows
        self._read = read

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads the block `index`: `...`, or a slice of step 1 for every axis."""
        return self._read(index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the whole tensor, as `np.asarray` asks it to."""
        return np.array(self[...], dtype=dtype, copy=copy)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor as stored."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"LazyTensor({self.shape}, {self.dtype})"


class Checkpoint(Mapping[str, LazyTensor]):
    """Released key -> tensor, none of them read yet.

    Attributes:
      origin: the path that it was opened at.
      archive: whether it is released as an `.npz`.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], origin: str, *, archive: bool = False):
        self._tensors = dict(sorted(tensors.items()))
        self.origin = origin
        self.archive = archive

    def __getitem__(self, key: str) -> LazyTensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({self.origin}, {len(self)} tensors)"


def open_checkpoint(source: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Opens a checkpoint without reading its tensors.

    Args:
      source: a `.safetensors` or `.npz` file; a safetensors index; a folder; or the `organisation/name`
        of a repository on the Hugging Face hub. Of a folder `model.safetensors` is taken, else the
        shards of `model.safetensors.index.json`, else `model.npz`, else its only file of these kinds.
      revision: branch, tag or commit of a hub repository.

    Raises:
      CheckpointFileError: there is no such checkpoint, it is damaged, or it is in a refused format.
    """
    path = fetch(source, revision=revision)
    if path.is_dir():
        path = _choose_file(path)
    if path.name.endswith(".index.json"):
        tensors = _open_index(path)
    elif path.suffix == ".safetensors":
        tensors = _open_safetensors(path)
    elif path.suffix == ".npz":
        tensors = _open_npz(path)
    else:
        raise CheckpointFileError(_refusal([path]))
    return Checkpoint(tensors, str(path), archive=path.suffix == ".npz")


def fetch(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The local path of a checkpoint, downloaded from the Hugging Face hub where it is `organisation/name`.

    Raises:
      CheckpointFileError: neither a local path nor a repository that can be downloaded or is in the cache.
    """
    path = Path(source)
    if path.exists():
        return path
    name = os.fspath(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise CheckpointFileError(f"{name}: no such file or folder, nor the `organisation/name` of a hub repository")
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointFileError(
            f"{name}: no such file or folder here, and it could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {error}). Without a connection, download the repository elsewhere and "
            "give the path of its folder"
        ) from error


def read_config(source: str | os.PathLike[str], *, name: str = "config.json") -> dict[str, Any]:
    """The settings that a checkpoint's folder comes with.

    Args:
      source: the folder.
      name: the file's name in it.

    Raises:
      CheckpointFileError: no such file, or not one JSON object.
    """
    return read_json(Path(source) / name, CheckpointFileError)


def copy_companions(source: Path, folder: epath.PathLike) -> tuple[epath.Path, ...]:
    """Copies what stands beside a checkpoint's weights, but for its index; files that are there already stay.

    Args:
      source: the folder of the checkpoint.
      folder: an existing one, local or `gs://`.

    Returns:
      The files written.
    """
    folder = epath.Path(folder)
    found = sorted({path.relative_to(source) for pattern in _COMPANIONS for path in source.glob(pattern)})
    companions = [name for name in found if name.name != MAP_FILE and not name.name.endswith(".index.json")]
    written = [name for name in companions if not (folder / name).exists()]
    for name in written:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((source / name).read_bytes())
    return tuple(folder / name for name in written)


def check_vacant(folder: Path) -> None:
    """Refuses a folder that holds a checkpoint already, of whatever kind.

    Raises:
      CheckpointFileError: it does.
    """
    for name in (SINGLE_FILE, INDEX_FILE, ARCHIVE_FILE, MAP_FILE):
        if (folder / name).exists():
            raise CheckpointFileError(f"{folder / name} exists: write to another folder, or remove the old checkpoint")


def save_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> tuple[Path, ...]:
    """Writes tensors as `model.safetensors`, or as shards with an index where they are larger.

    Every file is written under another name and renamed when all are complete, the index last: whoever
    opens the folder finds the whole checkpoint or none.

    Args:
      folder: made if need be; it may hold other files, but no checkpoint.
      tensors: key -> NumPy or JAX array; copied to the host one shard at a time.
      max_shard_bytes: most bytes of a shard; a single tensor that is larger gets a shard to itself.

    Returns:
      The files written.

    Raises:
      CheckpointFileError: the folder holds a checkpoint already, or a tensor has a dtype that safetensors
        cannot hold. Nothing has been written then.
    """
    folder = Path(folder)
    check_vacant(folder)
    writable = {np.dtype(dtype) for dtype in _DTYPES.values()}
    if wrong := [f"{key} ({tensor.dtype})" for key, tensor in tensors.items() if tensor.dtype not in writable]:
        raise CheckpointFileError(f"{folder}: safetensors cannot hold {', '.join(wrong)}; cast to a number type")
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


def save_archive(folder: str | os.PathLike[str], tensors: Mapping[str, Any]) -> tuple[Path, ...]:
    """Writes tensors as `model.npz`, the file of vision_transformer and big_vision.

    Args:
      folder: made if need be; it may hold other files, but no checkpoint.
      tensors: key -> NumPy or JAX array.

    Returns:
      The files written.

    Raises:
      CheckpointFileError: the folder holds a checkpoint already.
    """
    path = Path(folder) / ARCHIVE_FILE
    check_vacant(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not np.savez: a key may be called `file`.
    with (
        _renamed_when_complete(path.parent) as temporary,
        zipfile.ZipFile(temporary(path.name), "w") as archive,
    ):
        for key, tensor in tensors.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(tensor), allow_pickle=False)
    return (path,)


def _shards(tensors: Mapping[str, Any], max_bytes: int) -> list[list[str]]:
    """Keys in order, cut where the next tensor would not fit."""
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
    """Gives out temporary paths, and renames them in order on leaving, or removes all on an error."""
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


def _choose_file(folder: Path) -> Path:
    for name in (SINGLE_FILE, INDEX_FILE, ARCHIVE_FILE):
        if (folder / name).exists():
            return folder / name
    readable = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".npz"))
    if len(readable) == 1:
        return readable[0]
    if readable:
        raise CheckpointFileError(
            f"{folder}: which of {', '.join(path.name for path in readable)} is meant? Give the path of "
            f"the file, or the {INDEX_FILE} that lists the shards"
        )
    refused = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)
    if refused:
        raise CheckpointFileError(_refusal(refused))
    raise CheckpointFileError(
        f"{folder}: no {SINGLE_FILE}, {INDEX_FILE} or .npz file in this folder, nor a {MAP_FILE} of Orbax arrays"
    )


def _refusal(paths: list[Path]) -> str:
    names = ", ".join(map(str, paths))
    if any(path.suffix in _PICKLES for path in paths):
        return (
            f"{names}: pickled checkpoints are not read, because opening one can run any code. Convert it "
            "once, where you trust it: tensors = torch.load(FILE, map_location='cpu', weights_only=True); "
            "safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, "
            "'model.safetensors')"
        )
    return f"{names}: cannot be read as a checkpoint; expected .safetensors, .safetensors.index.json or .npz"


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        file = safetensors.safe_open(path, framework="numpy")
        slices = {key: file.get_slice(key) for key in file.offset_keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointFileError(_damaged(path, error)) from error
    tensors = {}
    for key, part in slices.items():
        stored = part.get_dtype()
        if stored not in _DTYPES:
            raise CheckpointFileError(f"{path}: {key} is stored as {stored}; can be read: {', '.join(_DTYPES)}")
        shape = tuple(part.get_shape())
        tensors[key] = (shape, np.dtype(_DTYPES[stored]))
    # Tensors follow each other without gaps up to the file's end; the library refuses other files.
    start = path.stat().st_size - sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    found = {}
    for key, (shape, dtype) in tensors.items():
        found[key] = LazyTensor(shape, dtype, _safetensors_reader(path, key, shape, dtype, start), by_rows=True)
        start += found[key].nbytes
    return found


def _safetensors_reader(
    path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype, start: int
) -> Callable[[Any], np.ndarray]:
    def read(index: Any) -> np.ndarray:
        """Reads rows as they lie in the file; a mapped file would keep what was read of it in memory."""
        first, stop = 0, shape[0] if shape else 1
        rest: list[slice] = []
        if isinstance(index, tuple) and index:
            rows, *rest = index
            first, stop, _ = rows.indices(shape[0])
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        size = max(0, stop - first) * row_bytes
        stored = np.fromfile(path, np.uint8, size, offset=start + first * row_bytes)
        if stored.size != size:
            raise CheckpointFileError(f"{key} of {_damaged(path, EOFError('the file has become shorter'))}")
        array = stored.view(dtype)
        return array.reshape(max(0, stop - first), *shape[1:])[(slice(None), *rest)] if shape else array.reshape(())

    return read


def _open_index(path: Path) -> dict[str, LazyTensor]:
    weight_map = read_json(path, CheckpointFileError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointFileError(f"{path}: no `weight_map` from keys to shard files")
    problems: list[str] = []
    tensors: dict[str, LazyTensor] = {}
    for name in sorted(set(weight_map.values())):
        listed = {key for key, shard in weight_map.items() if shard == name}
        if Path(name).name != name:
            problems.append(f"{name} is not the name of a file next to the index")
            continue
        if not (path.parent / name).is_file():
            problems.append(f"the shard {name} is missing ({len(listed)} tensors)")
            continue
        held = _open_safetensors(path.parent / name)
        problems += [f"{key} is not in {name}" for key in sorted(listed - held.keys())]
        problems += [f"{key} is in {name} but not in the index" for key in sorted(held.keys() - listed)]
        tensors |= {key: held[key] for key in listed & held.keys()}
    if problems:
        raise CheckpointFileError(f"{path} and its shards disagree; download them again:\n  " + "\n  ".join(problems))
    return tensors


def _open_npz(path: Path) -> dict[str, LazyTensor]:
    tensors = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    shape, dtype = _npy_header(file)
                key = member.removesuffix(".npy")
                if dtype.hasobject:
                    raise CheckpointFileError(
                        f"{path}: {key} is a pickled array, which is not read, because opening one can "
                        "run any code. Convert it once, where you trust it: numpy.load(FILE, "
                        "allow_pickle=True), then numpy.savez(NEW, **arrays) with number dtypes"
                    )
                tensors[key] = LazyTensor(shape, _npy_dtype(dtype), _npz_reader(path, member))
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise CheckpointFileError(_damaged(path, error)) from error
    except ValueError as error:
        if isinstance(error, CheckpointFileError):
            raise
        raise CheckpointFileError(_damaged(path, error)) from error
    return tensors


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _npy_dtype(dtype: np.dtype) -> np.dtype:
    """NumPy has no name for bfloat16 and stores it as two bytes without a meaning."""
    return np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype


def _npz_reader(path: Path, member: str) -> Callable[[Any], np.ndarray]:
    def read(index: Any) -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
        except (zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
            raise CheckpointFileError(f"{member} of {_damaged(path, error)}") from error
        return array.view(_npy_dtype(array.dtype))[index]

    return read


def _damaged(path: Path, error: Exception) -> str:
    if path.is_file():
        with path.open("rb") as file:
            if file.read(32).startswith(b"version https://git-lfs"):
                return f"{path}: only the pointer to the file, not the file; fetch it with `git lfs pull`"
        return f"{path} ({path.stat().st_size} bytes): damaged or cut short ({error}); download it again"
    return f"{path}: cannot be read ({error})"

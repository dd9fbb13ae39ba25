"""Reads released checkpoint files, safetensors and NumPy archives; `saving` writes them.

Opening reads names, shapes and dtypes; a tensor is read when it is indexed, and from a
safetensors file only the indexed slice. Formats that can run code when they are read (pickles:
`.bin`, `.pt`, pickled arrays) raise an error.
"""

import functools
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from io import IOBase
from pathlib import Path
from typing import IO

import huggingface_hub
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from vlm_jax.paths import absolute, regular
from vlm_jax.released_json import read_released
from vlm_jax.types import Dtype, Fields, Selection

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ARCHIVE_FILE = "model.npz"
# Files in a folder of Orbax arrays; see `checkpoints.mapped`.
MAP_FILE, PARAMS = "checkpoint_map.json", "params"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES: Fields = {
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
# Files next to the weights: settings, and the files of tokenizers, chat templates and processors.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja")
_DOWNLOADED = ("*.safetensors", "*.npz", *COMPANIONS)


class CheckpointFileError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and the fix."""


class LazyTensor:
    """A tensor in its file; indexing reads it.

    Attributes:
      shape: of the whole tensor.
      dtype: as stored.
      by_rows: whether reading some rows reads only these; else it may read the whole tensor.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: Dtype, read: Callable[[Selection], np.ndarray], *, by_rows: bool = False
    ):
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.by_rows = by_rows
        self._read = read

    def __getitem__(self, index: Selection) -> np.ndarray:
        """Reads the block `index`: `...`, or a slice of step 1 for every axis."""
        return self._read(index)

    def __array__(self, dtype: Dtype = None, copy: bool | None = None) -> np.ndarray:
        """Reads the whole tensor, for `np.asarray`."""
        return np.array(self[...], dtype=dtype, copy=copy)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor as stored."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"LazyTensor({self.shape}, {self.dtype})"


class Checkpoint(Mapping[str, LazyTensor]):
    """Released key -> unread tensor.

    Attributes:
      origin: the path that was opened.
      archive: whether it is an `.npz`.
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
        of a repository on the Hugging Face hub. In a folder `model.safetensors` is opened, else the
        shards of `model.safetensors.index.json`, else `model.npz`, else its only file of these formats.
      revision: branch, tag or commit of a hub repository.

    Raises:
      CheckpointFileError: there is no such checkpoint, it is damaged, or its format is not supported.
    """
    path = fetch(source, revision=revision)
    if path.is_dir():
        path = _choose_file(path)
    try:
        regular(path, CheckpointFileError)
    except FileNotFoundError as error:
        raise CheckpointFileError(f"{path}: a link to a file that does not exist") from error
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
      CheckpointFileError: not a local path, and not a repository that can be downloaded or is in the cache.
    """
    path = Path(absolute(source))
    if os.path.exists(path):  # False also for a text that no file can have as its path
        return path
    name = os.fspath(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        shown = name if len(name) <= 200 else f"{name[:100]}… ({len(name)} characters)"
        raise CheckpointFileError(f"{shown}: not a file or folder, and not the `organisation/name` of a hub repository")
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointFileError(
            f"{name}: not a local file or folder, and it could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {error}). Without a connection, download the repository elsewhere and "
            "pass the path of its folder"
        ) from error


def read_config(source: str | os.PathLike[str], *, name: str = "config.json") -> Fields:
    """The settings in a checkpoint's folder.

    Args:
      source: the folder.
      name: name of the file in it.

    Raises:
      CheckpointFileError: no such file, or not a JSON object.
    """
    return read_released(Path(source) / name, CheckpointFileError)


def _choose_file(folder: Path) -> Path:
    for name in (SINGLE_FILE, INDEX_FILE, ARCHIVE_FILE):
        if (folder / name).exists():
            return folder / name
    readable = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".npz"))
    if len(readable) == 1:
        return readable[0]
    if readable:
        raise CheckpointFileError(
            f"{folder}: expected one checkpoint, found {', '.join(path.name for path in readable)}; pass the path of "
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
            f"{names}: pickled checkpoints are not read, because opening one can run arbitrary code. Convert it "
            "once if you trust it: tensors = torch.load(FILE, map_location='cpu', weights_only=True); "
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
        if stored not in DTYPES:
            raise CheckpointFileError(f"{path}: {key} has dtype {stored}; expected one of {', '.join(DTYPES)}")
        shape = tuple(part.get_shape())
        tensors[key] = (shape, np.dtype(DTYPES[stored]))
    # Tensors follow each other without gaps up to the file's end; the library rejects other files.
    start = path.stat().st_size - sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    found = {}
    for key, (shape, dtype) in tensors.items():
        found[key] = LazyTensor(
            shape, dtype, functools.partial(_read_rows, path, key, shape, dtype, start), by_rows=True
        )
        start += found[key].nbytes
    return found


def _read_rows(
    path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype, start: int, index: Selection
) -> np.ndarray:
    """Reads rows of a tensor, which begins at byte `start`; a memory-mapped file would keep them in memory."""
    first, stop = 0, shape[0] if shape else 1
    rest: list[slice] = []
    if isinstance(index, tuple) and index:
        rows, *rest = index
        first, stop, _ = rows.indices(shape[0])
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    size = max(0, stop - first) * row_bytes
    stored = np.fromfile(path, np.uint8, size, offset=start + first * row_bytes)
    if stored.size != size:
        raise CheckpointFileError(f"{key} of {_damaged(path, EOFError('the file was truncated'))}")
    array = stored.view(dtype)
    return array.reshape(max(0, stop - first), *shape[1:])[(slice(None), *rest)] if shape else array.reshape(())


def _open_index(path: Path) -> dict[str, LazyTensor]:
    weight_map = read_released(path, CheckpointFileError).get("weight_map")
    if weight_map is None:
        raise CheckpointFileError(f"{path}: no `weight_map` from keys to shard files")
    problems: list[str] = []
    tensors: dict[str, LazyTensor] = {}
    for name in sorted(set(weight_map.values())):
        listed = {key for key, shard in weight_map.items() if shard == name}
        if Path(name).name != name:
            problems.append(f"{name} is not a file name next to the index")
            continue
        if not os.path.isfile(path.parent / name):  # nor a named pipe, which would be waited for
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
    tensors: dict[str, LazyTensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                key = member.filename.removesuffix(".npy")
                if key in tensors:
                    raise CheckpointFileError(f"{path}: has {key} twice; write it again with one array of each name")
                with archive.open(member) as file:
                    shape, dtype = _npy_header(file)
                    stored = member.file_size - file.tell()
                if dtype.hasobject:
                    raise CheckpointFileError(
                        f"{path}: {key} is a pickled array, which is not read, because opening one can "
                        "run arbitrary code. Convert it once if you trust it: numpy.load(FILE, "
                        "allow_pickle=True), then numpy.savez(NEW, **arrays) with numeric dtypes"
                    )
                # Before an array of this size is made.
                if any(type(length) is not int or length < 0 for length in shape) or (
                    stored != math.prod(shape) * dtype.itemsize
                ):
                    raise CheckpointFileError(
                        f"{path}: {key} has the shape {shape} of {dtype} in its header, but {stored} bytes; write the "
                        "file again"
                    )
                tensors[key] = LazyTensor(shape, _npy_dtype(dtype), _npz_reader(path, member.filename))
    except CheckpointFileError:
        raise
    except Exception as error:  # of the archive, its compression, or the headers, which raise many types
        raise CheckpointFileError(_damaged(path, error)) from error
    return tensors


def _npy_header(file: IO[bytes] | IOBase) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _npy_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of a stored array: NumPy stores bfloat16 as two raw bytes."""
    return np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype


def _npz_reader(path: Path, member: str) -> Callable[[Selection], np.ndarray]:
    def read(index: Selection) -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # as above
            raise CheckpointFileError(f"{member} of {_damaged(path, error)}") from error
        return array.view(_npy_dtype(array.dtype))[index]

    return read


def _damaged(path: Path, error: Exception) -> str:
    if path.is_file():
        with path.open("rb") as file:
            if file.read(32).startswith(b"version https://git-lfs"):
                return f"{path}: a Git LFS pointer instead of the file; fetch it with `git lfs pull`"
        return f"{path} ({path.stat().st_size} bytes): damaged or truncated ({error}); download it again"
    return f"{path}: cannot be read ({error})"

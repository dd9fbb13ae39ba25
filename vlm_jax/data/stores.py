"""Random access to the records of files, whatever their format; the format is told by the content.

| format | a record is |
|---|---|
| JSON array, JSONL | an element, or a line; offsets are kept, not objects |
| parquet (pyarrow) | a row |
| WebDataset tar | the members of one base name: pictures and videos, `json`, `txt` |
| ArrayRecord | JSON |

Text is UTF-8, with a byte order mark or without, and any of these files may be compressed by gzip. A path with `*`
stands for all files that match it, in the order of their names.
"""

import json
import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

from vlm_jax.config import ConfigError
from vlm_jax.data.local_file import LocalFile, UnreadableFile
from vlm_jax.data.text_offsets import Spans, Unbalanced, array_spans, line_spans
from vlm_jax.paths import absolute

FORMATS = "a JSON array, JSONL, parquet, a WebDataset tar or ArrayRecord"
_BOM = b"\xef\xbb\xbf"
# First bytes of files that are something else.
_OTHERS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "compressed by zstandard",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x80\x04\x95": "a Python pickle",
    b"\x80\x05\x95": "a Python pickle",
    b"ARROW1": "an Arrow file",
    b"SQLite": "an SQLite database",
}


class MalformedRecords(ValueError):
    """Records of a file that cannot be used; the message lists them as file:line or file[index]."""


@runtime_checkable
class Store(Protocol):
    """The records of a file.

    Attributes:
      path: of the file.
      folder: that paths of its records are relative to.
      noun: what its records are, in the plural.
    """

    path: str
    folder: str
    noun: str

    def __len__(self) -> int: ...

    def fields(self, index: int, *, whole: bool = True) -> Any:
        """The record; without `whole`, bytes of pictures may be left out.

        Raises:
          ValueError: it cannot be read; the message has the reason only.
        """
        ...

    def number(self, index: int) -> int:
        """How the file counts the record: its line from 1, or its index from 0."""
        ...

    def place(self, index: int) -> str:
        """The file and where the record is in it, for messages."""
        ...

    def digest(self) -> str:
        """A hash of the content."""
        ...


class IndexedStore:
    """What stores of one file share; records are counted by their indices, and the file has an index at an end."""

    def __init__(self, file: LocalFile):
        self.path, self.folder, self._file = file.name, os.path.dirname(file.name), file

    def number(self, index: int) -> int:
        """As `Store.number`."""
        return index

    def place(self, index: int) -> str:
        """As `Store.place`."""
        return f"{self.path}[{index}]"

    def digest(self) -> str:
        """As `Store.digest`, of the ends of the file."""
        return self._file.summary()


class Lines(IndexedStore):
    """The lines of a JSONL file."""

    noun = "lines"

    def __init__(self, file: LocalFile, start: int):
        super().__init__(file)
        self._spans, self._lines = line_spans(file, start)

    def __len__(self) -> int:
        return len(self._spans)

    def fields(self, index: int, *, whole: bool = True) -> Any:
        """As `Store.fields`."""
        del whole
        start, stop = self._spans[index].tolist()
        return parsed(self._file.read(start, stop - start))

    def number(self, index: int) -> int:
        """As `Store.number`."""
        return index + 1 if self._lines is None else int(self._lines[index])

    def place(self, index: int) -> str:
        """As `Store.place`."""
        return f"{self.path}:{self.number(index)}"

    def digest(self) -> str:
        """As `Store.digest`."""
        return self._file.digest()


class JsonArray(IndexedStore):
    """The elements of a JSON array."""

    noun = "elements"

    def __init__(self, file: LocalFile, start: int):
        super().__init__(file)
        try:
            self._spans: Spans = array_spans(file, start)
        except Unbalanced as error:
            raise MalformedRecords(self._fault(error)) from None

    def _fault(self, error: Unbalanced) -> str:
        """The first element with a fault, else where the array ends too early or too late."""
        for start, stop in error.spans.tolist():
            try:
                text = self._file.read(start, stop - start).decode()
                json.loads(text)
            except json.JSONDecodeError as cause:
                line = self._file.line_at(start + len(text[: cause.pos].encode()))
                return f"{self.path}:{line}: not a JSON array: {cause.msg}"
            except UnicodeDecodeError as cause:
                return f"{self.path}:{self._file.line_at(start + cause.start)}: {not_utf8(cause)}"
        line = self._file.line_at(error.offset)
        return f"{self.path}:{line}: not a JSON array: {error}; write one array, or one object a line"

    def __len__(self) -> int:
        return len(self._spans)

    def fields(self, index: int, *, whole: bool = True) -> Any:
        """As `Store.fields`."""
        del whole
        start, stop = self._spans[index].tolist()
        data = self._file.read(start, stop - start)
        first = start + len(data) - len(data.lstrip())
        try:
            return parsed(data)
        except ValueError as error:
            raise ValueError(f"(line {self._file.line_at(first)}) {error}") from None

    def digest(self) -> str:
        """As `Store.digest`."""
        return self._file.digest()


class Shards:
    """Several files as one."""

    def __init__(self, path: str, stores: Sequence[Store]):
        self.path, self.folder, self.noun = path, stores[0].folder, stores[0].noun
        self._stores, self._ends = stores, np.cumsum([len(store) for store in stores])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[Store, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._stores[shard], index - (int(self._ends[shard - 1]) if shard else 0)

    def fields(self, index: int, *, whole: bool = True) -> Any:
        """As `Store.fields`."""
        store, place = self._locate(index)
        return store.fields(place, whole=whole)

    def number(self, index: int) -> int:
        """As `Store.number`, over all files."""
        return index

    def place(self, index: int) -> str:
        """As `Store.place`."""
        store, place = self._locate(index)
        return store.place(place)

    def digest(self) -> str:
        """As `Store.digest`."""
        return " ".join(store.digest() for store in self._stores)


def open_store(path: str, key: str) -> Store:
    """Opens a file, or the files of a pattern, and finds where their records are.

    Args:
      path: local or `gs://`.
      key: of the path under config.data, for messages.

    Raises:
      ConfigError: there is no such file, or it is a folder.
      MalformedRecords: it is not text in UTF-8, is damaged, or has another format.
    """
    paths = files_of(path)
    if not paths:
        raise ConfigError(f"config.data.{key}: no file matches '{path}'")
    return Shards(path, [_open(found, key) for found in paths]) if "*" in path else _open(paths[0], key)


def files_of(path: str) -> list[str]:
    """The files of a path or a pattern, in absolute form."""
    whole = absolute(path)
    if "*" not in path:
        return [whole]
    folder, name = os.path.split(whole)
    return sorted(os.fspath(found) for found in epath.Path(folder or ".").glob(name))


SUFFIXES = (".array_record", ".arrayrecord", ".gz", ".json", ".jsonl", ".parquet", ".tar")  # of files of records


def _open(path: str, key: str) -> Store:
    source = epath.Path(path)
    if not source.exists():
        raise ConfigError(f"config.data.{key}: there is no file '{path}'")
    if source.is_dir():
        found = sorted({entry.suffix for entry in source.iterdir()} & set(SUFFIXES))
        way = f", or a pattern such as {path}/*{found[0]}" if found else ""
        raise ConfigError(f"config.data.{key}: '{path}' is a folder; name a file of records{way}")
    try:
        file = LocalFile(os.fspath(source))
    except UnreadableFile as error:
        raise MalformedRecords(str(error)) from error
    head = file.read(0, 4096)
    if head.startswith(b"PAR1"):
        from vlm_jax.data.parquet import ParquetRows

        return ParquetRows(file)
    if head[257:262] == b"ustar":
        from vlm_jax.data.tar_members import TarSamples

        return TarSamples(file)
    from vlm_jax.data.array_records import SIGNATURE, ArrayRecords

    if head.startswith(SIGNATURE):
        return ArrayRecords(file)
    _check_text(path, head)
    start = len(_BOM) if head.startswith(_BOM) else 0
    first = _first_byte(file, start)
    return JsonArray(file, first) if file.read(first, 1) == b"[" else Lines(file, start)


def _check_text(path: str, head: bytes) -> None:
    """Raises a MalformedRecords for what is not a text in UTF-8 by its first bytes."""
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            raise MalformedRecords(f"{path}: this is {what}; expected {FORMATS}")
    wide = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32"}
    found = [name for mark, name in wide.items() if head.startswith(mark)]
    if not found and b"\x00" in head:
        found = ["UTF-16 without a byte order mark, or no text" if head.count(b"\x00") * 3 > len(head) else "no text"]
    if found:
        raise MalformedRecords(f"{path}:1: expected UTF-8 text, got {found[-1]}; {_convert(found[-1])}")


def _convert(encoding: str) -> str:
    name = encoding if encoding in ("UTF-16", "UTF-32") else "THE_ENCODING"
    return f"convert it: iconv -f {name} -t UTF-8 FILE > NEW"


def _first_byte(file: LocalFile, start: int) -> int:
    """Offset of the first byte that is not white space."""
    while start < file.size:
        part = file.read(start, 4096)
        rest = part.lstrip()
        start += len(part) - len(rest)
        if rest:
            break
    return start


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with a record, and what to do."""
    byte = error.object[error.start]
    return f"expected UTF-8 text, got the byte 0x{byte:02x} (Latin-1?); {_convert('another encoding')}"


def parsed(data: bytes) -> Any:
    """The value of JSON text.

    Raises:
      ValueError: it is not JSON in UTF-8; the message says why.
    """
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(error)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}{_looks_like(error)}") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply to be read") from None


def _looks_like(error: json.JSONDecodeError) -> str:
    text = error.doc.strip()
    if text in ("{", "["):
        return "; the object goes on over several lines: write one object a line, or a JSON array of them"
    if error.msg == "Extra data" and text.count("}{") + text.count("}\r{"):
        return "; several objects are on the line: write one a line"
    if text[:1] not in "{[":
        return f"; expected {FORMATS}"
    return ""

"""Bytes of a file at any place, whether it is local, remote or compressed."""

import gzip
import hashlib
import os
import shutil
import tempfile
import weakref
import zlib

from etils import epath

from vlm_jax.paths import regular
from vlm_jax.types import Fields

PART = 1 << 20


class UnreadableFile(ValueError):
    """A file that is not regular, or cannot be decompressed."""


class LocalFile:
    """Random access to a file, from several threads and, after pickling, processes.

    A remote file or one that is compressed by gzip is first copied to a temporary file, which is removed with
    this object.

    Args:
      path: local or `gs://`.

    Raises:
      OSError: it cannot be read.
      UnreadableFile: it is not a regular file, or is compressed by gzip and damaged.
    """

    def __init__(self, path: str):
        self.name = path
        source = regular(path, UnreadableFile)
        with source.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        remote = "://" in path
        self._path = path
        if compressed or remote:
            self._path = _copied(source, compressed)
            weakref.finalize(self, _remove, self._path, os.getpid())
        self._descriptor = os.open(self._path, os.O_RDONLY)
        self.size = os.path.getsize(self._path)

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes; fewer at the end of the file."""
        parts = []
        while size > 0:
            part = os.pread(self._descriptor, size, offset)
            if not part:
                break
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    @property
    def path(self) -> str:
        """A path of the uncompressed bytes on this machine."""
        return self._path

    def digest(self) -> str:
        """A hash of the content."""
        made = hashlib.blake2b(digest_size=16)
        for offset in range(0, self.size, PART):
            made.update(self.read(offset, PART))
        return made.hexdigest()

    def summary(self) -> str:
        """A hash of the size, the first and the last megabyte, for files with an index at an end."""
        ends = self.read(0, PART) + self.read(max(self.size - PART, 0), PART)
        return f"{self.size} {hashlib.blake2b(ends, digest_size=16).hexdigest()}"

    def line_at(self, offset: int) -> int:
        """The number, from 1, of the line that has the byte at `offset`."""
        return 1 + sum(
            self.read(start, min(PART, offset - start)).count(b"\n") for start in range(0, max(offset, 0), PART)
        )

    def __getstate__(self) -> Fields:
        return {key: value for key, value in self.__dict__.items() if key != "_descriptor"}

    def __setstate__(self, state: Fields) -> None:
        self.__dict__ |= state
        self._descriptor = os.open(self._path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def _copied(source: epath.Path, compressed: bool) -> str:
    descriptor, path = tempfile.mkstemp(prefix="vlm_jax_")
    try:
        with os.fdopen(descriptor, "wb") as target, source.open("rb") as file:
            shutil.copyfileobj(gzip.GzipFile(fileobj=file) if compressed else file, target, PART)  # type: ignore
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        os.unlink(path)
        raise UnreadableFile(
            f"{source}: expected UTF-8 text, plain or compressed by gzip: compressed by gzip, but damaged: {error}"
        ) from error
    except BaseException:
        os.unlink(path)
        raise
    return path


def _remove(path: str, process: int) -> None:
    if os.getpid() == process and os.path.exists(path):
        os.unlink(path)

"""WebDataset tar files: consecutive members of one base name are a sample.

`key.jpg`, `key.json` and `key.txt` have the base name `key`; what follows its first dot is the member's extension.
Source: webdataset, tariterators.py, group_by_keys.
"""

import array
import os
import tarfile
from typing import Any

import numpy as np

from vlm_jax.data.local_file import LocalFile
from vlm_jax.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Member
from vlm_jax.data.stores import IndexedStore, MalformedRecords, parsed


class TarSamples(IndexedStore):
    """The samples of a tar; see `stores.Store`. Kept are three numbers a member and one a sample."""

    noun = "samples"

    def __init__(self, file: LocalFile):
        super().__init__(file)
        codes: dict[str, int] = {}
        numbers, firsts, key, count = array.array("q"), array.array("q"), None, 0
        try:
            with tarfile.open(file.path, "r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore  # which would grow with the file
                    if not member.isfile() or os.path.basename(member.name).startswith("."):
                        continue
                    name, extension = _split(member.name)
                    if name != key:
                        key = name
                        firsts.append(count)
                    code = codes.setdefault(extension, len(codes))
                    numbers.extend((member.offset, member.offset_data, member.size, code))
                    count += 1
                    if member.offset_data + member.size > file.size:
                        raise tarfile.ReadError("unexpected end of data")
        except tarfile.TarError as error:
            raise MalformedRecords(f"{self.path}: a tar that is cut off or damaged: {error}; write it again") from error
        self._extensions = list(codes)
        self._members = np.frombuffer(numbers, np.int64).reshape(-1, 4)
        self._firsts = np.append(np.frombuffer(firsts, np.int64), count)

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def fields(self, index: int, *, whole: bool = True) -> Any:
        """The object of the sample's `json`, or nothing; with `images`, `videos`, `caption` (its `txt`) and `id`.

        Raises:
          ValueError: the `json` is not an object, the `txt` not UTF-8, or the numbers of pictures differ.
        """
        del whole
        pictures: list[Member] = []
        videos: list[Member] = []
        found: dict[str, Any] = {}
        caption, key = None, self._key(index)
        for _, offset, size, code in self._members[self._firsts[index] : self._firsts[index + 1]].tolist():
            extension = self._extensions[code]
            last = f".{extension.rsplit('.', 1)[-1].lower()}"
            if last in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
                kept = pictures if last in IMAGE_SUFFIXES else videos
                kept.append(Member(self._file, offset, size, f"{key}.{extension}"))
            elif last == ".json":
                found = parsed(self._file.read(offset, size))
                if not isinstance(found, dict):
                    raise ValueError(f"{extension}: expected a JSON object, got {type(found).__name__}")
            elif last == ".txt":
                caption = self._file.read(offset, size).decode("utf-8").strip()
            else:
                found[f".{extension}"] = None
        for kind, members in (("image", pictures), ("video", videos)):
            named = [key for key in (kind, f"{kind}s") if found.pop(key, None) not in (None, "", [])]
            if named and not members:
                raise ValueError(f"{named[0]}: names files, but the sample has no such member")
            if members:
                found[f"{kind}s"] = members
        if caption is not None:
            found["caption"] = caption
        return {"id": key, **found}

    def _key(self, index: int) -> str:
        """The base name, read from the header of the sample's first member."""
        start = int(self._members[self._firsts[index], 0])
        header = tarfile.TarInfo.frombuf(self._file.read(start, tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        if header.type in tarfile.REGULAR_TYPES:
            return _split(header.name)[0]
        with tarfile.open(self._file.path, "r:") as tar:
            assert tar.fileobj is not None
            tar.fileobj.seek(start)
            tar.offset = start  # type: ignore
            return _split(tarfile.TarInfo.fromtarfile(tar).name)[0]

    def place(self, index: int) -> str:
        """The file and the base name."""
        return f"{self.path}:{self._key(index)}"


def _split(name: str) -> tuple[str, str]:
    """Base name with its folder, and extension."""
    folder, last = os.path.split(name)
    base, _, extension = last.partition(".")
    return os.path.join(folder, base), extension

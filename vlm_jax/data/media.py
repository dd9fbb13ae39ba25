"""References to the pictures and videos of records, and the bytes that they stand for."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from vlm_jax.data.local_file import LocalFile
from vlm_jax.sources import located

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")
NOT_READ = b""  # stands for bytes that only checking a record does not read


@dataclasses.dataclass(frozen=True)
class Member:
    """Bytes inside of a file.

    Attributes:
      file: that file.
      offset, size: where they are in it.
      name: of the member.
    """

    file: LocalFile
    offset: int
    size: int
    name: str


# A path, a data URL, bytes, or bytes inside of another file.
Media = str | bytes | Member


def media(value: Any, folder: str) -> Media:
    """The reference that a record's value is.

    Args:
      value: a path relative to the folder, an absolute or `gs://` path, a `file://` or `data:` URL, bytes, or a mapping
        with `bytes` or `path`, as `datasets` stores pictures.
      folder: of the record's file.

    Raises:
      ValueError: another value, or a URL of the web.
    """
    if not isinstance(value, str) and isinstance(value, Mapping) and set(value) <= {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes | Member):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a path, a data URL or bytes, got {_short(value)}")
    if value.startswith("data:"):
        return value
    if value.startswith(("http://", "https://")):
        raise ValueError(f"{_short(value)} is on the web; download it and name the file")
    found = located(value)
    assert isinstance(found, str)  # bytes are of data URLs only
    return found if "://" in found else os.path.join(folder, found)


def content(reference: Media) -> str | bytes:
    """The path or the bytes of a reference.

    Raises:
      ValueError: a data URL that is not base64.
      OSError: the file of a member cannot be read.
    """
    if isinstance(reference, Member):
        return reference.file.read(reference.offset, reference.size)
    if isinstance(reference, str) and reference.startswith("data:"):
        return located(reference)
    return reference


def name_of(reference: Media) -> str:
    """A short name for messages."""
    if isinstance(reference, Member):
        return f"{reference.file.name}:{reference.name}"
    return f"{len(reference)} bytes" if isinstance(reference, bytes) else _short(reference, quoted=False)


def holds_media(value: Any) -> bool:
    """Whether a value that no schema reads looks like a picture or a video, or a list of some."""
    if isinstance(value, list | tuple):
        return any(holds_media(item) for item in value)
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) or any(key in value for key in ("image_url", "video_url"))
    if isinstance(value, bytes | Member):
        return True
    if not isinstance(value, str) or value.startswith(("http://", "https://")):
        return False
    return value.startswith("data:image/") or value.lower().endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES)


def _short(value: Any, quoted: bool = True) -> str:
    text = repr(value) if quoted else str(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"

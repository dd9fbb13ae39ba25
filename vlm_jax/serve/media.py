"""Images and videos of a request: data URLs, base64, and web addresses of allowed hosts, but no file of the server."""

from collections.abc import Sequence
from typing import Any

from vlm_jax.processors.items import ITEM_TYPES, MediaItem, read_messages
from vlm_jax.processors.learned import PromptError
from vlm_jax.sources import WEB, SourceError, WebAccess, located, shortened
from vlm_jax.types import Fields, Message

SOURCES = frozenset(key for form in ITEM_TYPES.values() if form.kind for key in form.sources)


def with_bytes(messages: Sequence[Message], access: WebAccess, max_media: int) -> list[Message]:
    """The messages with the bytes of every image and video in its item.

    Args:
      messages: of a request.
      access: which web addresses are downloaded.
      max_media: maximum number of images and videos.

    Raises:
      PromptError, PictureMismatch: as `read_messages`, or too many images and videos.
      SourceError: a location that is not allowed, or cannot be read.
    """
    read, found = read_messages(messages)
    if len(found) > max_media:
        raise PromptError(f"messages: expected at most {max_media} images and videos, got {len(found)}")
    following, changed = iter(found), []
    for message, plain in zip(messages, read, strict=True):
        content = message.get("content")
        if isinstance(content, list):
            items = zip(content, plain["content"], strict=True)
            content = [item if one["type"] == "text" else _item(item, next(following), access) for item, one in items]
        changed.append({**message, "content": content})
    return changed


def _item(item: Fields, media: MediaItem, access: WebAccess) -> Fields:
    """The item with the bytes of its image or video, and its other settings."""
    kept = {key: value for key, value in item.items() if key not in SOURCES}
    return {**kept, "type": media.kind, media.kind: _bytes(media.source, access, media.where)}


def _bytes(source: Any, access: WebAccess, where: str) -> Any:
    """The bytes of a picture or of a video, or of each frame of a video."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, list):
        return [_bytes(frame, access, where) for frame in source]
    is_inline = isinstance(source, str) and source.startswith("data:")
    if not isinstance(source, str) or not (is_inline or source.partition("://")[0].lower() in WEB):
        shown = shortened(source) if isinstance(source, str) else f"a value of type {type(source).__name__}"
        raise PromptError(f"{where}: expected a data URL or a web address, got {shown}")
    try:
        return located(source, allow_network=access)
    except SourceError as error:
        raise SourceError(f"{where}: {error}") from error

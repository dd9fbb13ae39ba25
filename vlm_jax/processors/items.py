"""Reads users' messages: every item, key and text is read, or refused by its name."""

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlm_jax.config import did_you_mean
from vlm_jax.processors.image import CorruptImage
from vlm_jax.processors.learned import PromptError
from vlm_jax.processors.video import FrameSettings, check_rate
from vlm_jax.processors.views import ItemSize, PictureMismatch, check_whole
from vlm_jax.sources import SourceError, decoded
from vlm_jax.types import Fields, Message

Kind = Literal["image", "video"]
VIDEO_SIZE = tuple(field.name for field in dataclasses.fields(ItemSize))
SIZE = tuple(name for name in VIDEO_SIZE if name != "total_pixels")
FRAMES = tuple(field.name for field in dataclasses.fields(FrameSettings))
MESSAGE_KEYS = ("role", "content", "loss", "weight")  # a chat template may read others


@dataclasses.dataclass(frozen=True)
class ItemType:
    """One type of the items of a message.

    Attributes:
      kind: what it is in a prompt.
      sources: keys that have its content; an item has at most one, and a text exactly one.
      settings: keys of its own settings.
    """

    kind: Kind | None
    sources: tuple[str, ...]
    settings: tuple[str, ...] = ()


# Type of an item -> what is read of it; all other types and keys are refused.
ITEM_TYPES: dict[str, ItemType] = {
    "text": ItemType(None, ("text",)),
    "image": ItemType("image", ("image", "path", "url", "base64", "image_url"), SIZE),
    "image_url": ItemType("image", ("image_url", "url"), SIZE),
    "video": ItemType("video", ("video", "path", "url", "base64", "video_url"), VIDEO_SIZE + FRAMES),
    "video_url": ItemType("video", ("video_url", "url"), VIDEO_SIZE + FRAMES),
}
URL_KEYS = ("image_url", "video_url")  # whose value may be a mapping with `url`, as in OpenAI's interface
# Of an item without a type, the key that shows it.
_BY_KEY = {"text": "text", "image": "image", "image_url": "image_url", "video": "video", "video_url": "video_url"}


@dataclasses.dataclass(frozen=True)
class MediaItem:
    """An image or a video of a message.

    Attributes:
      kind: image or video.
      source: the picture or the video; None where it is given separately.
      size, frames: its own settings.
      where: its message and its place there, for errors.
    """

    kind: Kind
    source: Any
    size: ItemSize
    frames: FrameSettings
    where: str


def read_messages(messages: Sequence[Message]) -> tuple[list[Fields], list[MediaItem]]:
    """The messages as prompts read them, and their images and videos in order.

    Args:
      messages: each with a `role` and a `content`: a text, or items of the types and keys of `ITEM_TYPES`; a key whose
        value is None counts as missing.

    Returns:
      The messages, whose items have the type text, image or video; an image keeps a source that is a path or a URL
      under `image`, since Qwen-VL writes it. And the images and videos.

    Raises:
      PromptError: an item, a key or a value that is not read.
      PictureMismatch: a setting out of its range.
    """
    read, found = [], []
    for number, message in enumerate(messages):
        where = f"message {number}"
        kept = {key: value for key, value in message.items() if value is not None}
        if not isinstance(kept.get("role"), str) or not kept["role"]:
            raise PromptError(f"{where}: role: expected a text such as 'user', got {message.get('role')!r}")
        content = kept.get("content")
        if content is not None and not isinstance(content, str):
            if not isinstance(content, Sequence) or isinstance(content, bytes):
                shown = f"a value of type {type(content).__name__}"
                raise PromptError(f"{where}: content: expected a text or a list of items, got {shown}; write [item]")
            items = []
            for place, item in enumerate(content):
                one, media = _item(item, f"{where}, item {place}")
                items.append(one)
                found += media
            kept["content"] = items
        read.append(kept)
    return read, found


def check_message_keys(messages: Sequence[Message], also: Collection[str] = ()) -> None:
    """Raises a `PromptError` for a key of a message that the prompt does not read.

    Args:
      messages: of a conversation.
      also: keys that it reads besides `MESSAGE_KEYS`.
    """
    for number, message in enumerate(messages):
        for key in message:
            if key not in MESSAGE_KEYS and key not in also:
                raise PromptError(f"message {number}: the key '{key}' is not read by this model's prompt; remove it")


def check_kinds(messages: Sequence[Message], kinds: Collection[str]) -> None:
    """Raises a `PromptError` for an item of a kind that the prompt does not read.

    Args:
      messages: from `read_messages`.
      kinds: the kinds that it reads, besides text.
    """
    for number, item in media_items(messages):
        if item["type"] not in kinds:
            reads = ", ".join(("text", *kinds))
            raise PromptError(f"message {number} has an item of type '{item['type']}'; this model reads {reads}")


def media_items(messages: Sequence[Message]) -> Iterator[tuple[int, Message]]:
    """(number of the message, item) of every image and video, in order."""
    for number, message in enumerate(messages):
        content = message.get("content")
        for item in () if content is None or isinstance(content, str) else content:
            if item["type"] != "text":
                yield number, item


def texts_of(messages: Sequence[Message]) -> Iterator[tuple[int, str]]:
    """(number of the message, text) of every text, in order."""
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str):
            yield number, content
            continue
        for item in content or ():
            if item["type"] == "text":
                yield number, item["text"]


def _item(item: object, where: str) -> tuple[Fields, list[MediaItem]]:
    """One item as prompts read it, and its image or video."""
    if not isinstance(item, Mapping):
        form = '{"type": "text", "text": "…"}'
        raise PromptError(f"{where}: expected a dict such as {form}, got {_shown(item)}")
    given = {key: value for key, value in item.items() if value is not None}
    name = given.pop("type", None)
    if name is None:
        shown = [key for key in given if key in _BY_KEY]
        name = _BY_KEY[shown[0]] if len(shown) == 1 else None
    if not isinstance(name, str) or name not in ITEM_TYPES:
        near = did_you_mean(name, ITEM_TYPES) if isinstance(name, str) else f"; known here: {', '.join(ITEM_TYPES)}"
        raise PromptError(f"{where}: no item of type {name!r} is read{near}")
    form = ITEM_TYPES[name]
    unknown = [key for key in given if key not in (*form.sources, *form.settings)]
    if unknown:
        near = did_you_mean(str(unknown[0]), (*form.sources, *form.settings))
        raise PromptError(f"{where}: the key {unknown[0]!r} of an item of type '{name}' is not read{near}")
    sources = [key for key in given if key in form.sources]
    if len(sources) > 1:
        raise PromptError(f"{where}: expected one of the keys {' and '.join(sources)}, got {len(sources)}")
    if form.kind is None:
        if not isinstance(given.get("text"), str):
            raise PromptError(f"{where}: text: expected a text, got {_shown(given.get('text'))}")
        return {"type": "text", "text": given["text"]}, []
    source = _source(sources[0], given[sources[0]], where) if sources else None
    try:
        for key in form.settings:
            if key in given and key == "fps":
                check_rate(given[key])
            elif key in given:
                check_whole(given[key], key)
        size = ItemSize(**{key: given[key] for key in VIDEO_SIZE if key in given})
        frames = FrameSettings(**{key: given[key] for key in FRAMES if key in given})
    except PictureMismatch as error:
        raise PictureMismatch(f"{where}: {error}") from error
    told = {"image": source} if form.kind == "image" and isinstance(source, str) and source[:5] != "data:" else {}
    return {"type": form.kind, **told}, [MediaItem(form.kind, source, size, frames, where)]


def _source(key: str, value: Any, where: str) -> Any:
    """The picture or the video that a key of an item has."""
    if key in URL_KEYS and isinstance(value, Mapping):
        unread = [name for name in value if name != "url" and (name, value[name]) != ("detail", "auto")]
        if unread:
            raise PromptError(f"{where}: {key}.{unread[0]} is not read; remove it")
        value = value.get("url")
        key = f"{key}.url"
    if key == "base64":
        if not isinstance(value, str | bytes):
            raise PromptError(f"{where}: base64: expected a text, got {_shown(value)}")
        try:
            return decoded(value if isinstance(value, str) else value.decode("ascii", "replace"))
        except SourceError as error:
            raise CorruptImage(f"{where}: base64: {error}") from error
    if key not in ("image", "video") and not isinstance(value, str | os.PathLike):
        raise PromptError(f"{where}: {key}: expected a path or a URL, got {_shown(value)}")
    if key == "image" and not isinstance(value, Image.Image | np.ndarray | str | os.PathLike | bytes):
        raise PromptError(
            f"{where}: image: expected a path, a URL, bytes, a Pillow image or a NumPy array, got {_shown(value)}"
        )
    return value


def _shown(value: object) -> str:
    if value is None or isinstance(value, int | float | bool):
        return repr(value)
    return f"a value of type {type(value).__name__}" if not isinstance(value, str) else repr(value[:80])

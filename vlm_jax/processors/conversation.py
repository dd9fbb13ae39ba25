"""Checks of users' conversations: messages, with images and videos inside or next to them."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.processors.chat import ChatTemplateError
from vlm_jax.processors.image import CorruptImage
from vlm_jax.processors.items import Kind, MediaItem
from vlm_jax.processors.plain_prompt import UnknownText
from vlm_jax.processors.spelled_prompt import PromptError
from vlm_jax.processors.tokenizer import TokenizerError
from vlm_jax.processors.video import FrameSettings
from vlm_jax.processors.views import ItemSize, PictureMismatch, check_list
from vlm_jax.types import Message

Picture = Image.Image | np.ndarray | str | os.PathLike | bytes
Video = Sequence[Picture] | str | os.PathLike | bytes
Conversation = Sequence[Message]
Given = TypeVar("Given")


ERRORS = (
    ChatTemplateError,
    CorruptImage,
    InfeasibleBudget,
    PictureMismatch,
    PromptError,
    TokenizerError,
    UnknownText,
)


@contextlib.contextmanager
def error_context(name: str) -> Iterator[None]:
    """Prefixes errors with the sample's name unless they have it."""
    try:
        yield
    except ERRORS as error:
        if name in str(error):
            raise
        raise type(error)(f"{name}: {error}") from error


def check_given(name: str, messages: object, images: object, videos: object) -> None:
    """Raises unless given lists; a bare string would be iterated by character."""
    form = '{"role": "user", "content": "…"}'
    if isinstance(messages, str):
        form, shown = form.replace('"…"', repr(messages)), f"the string {messages!r}"
        raise PromptError(f"{name}: expected a list of messages, got {shown}; write [{form}]")
    if not isinstance(messages, Sequence):
        shown = f"one {type(messages).__name__}"
        raise PromptError(f"{name}: expected a list of messages such as {form}, got {shown}; write [message]")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(f"{name}: message {number}: expected a dict such as {form}, got {message!r}")
    check_list(images, f"{name}: images")
    check_list(videos, f"{name}: videos")


def given_media(items: Sequence[MediaItem], kind: Kind, beside: Sequence[Given], name: str) -> list[MediaItem]:
    """The images or videos of a conversation, from its messages or from the separate list.

    Raises:
      PictureMismatch: they are given in both places.
    """
    own = [item for item in items if item.kind == kind]
    inside = [item for item in own if item.source is not None]
    if not beside:
        return inside
    if inside:
        raise PictureMismatch(
            f"{name}: {kind}s are given both in its messages and separately; pass them in one of the two"
        )
    if len(own) != len(beside):  # some are marked by their placeholders in texts
        settled = [item for item in own if item.size != ItemSize() or item.frames != FrameSettings()]
        if settled:
            raise PictureMismatch(
                f"{name}: {settled[0].where} has settings of its {kind}, but there are {len(own)} items for "
                f"{len(beside)} {kind}s; pass one item for every {kind}"
            )
        own = [MediaItem(kind, None, ItemSize(), FrameSettings(), "") for _ in beside]
    return [dataclasses.replace(item, source=source) for item, source in zip(own, beside, strict=True)]

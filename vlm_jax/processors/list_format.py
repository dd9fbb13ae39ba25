"""Converts Qwen-VL's texts to lists of images, named regions, boxes and text, and back.

Source: QwenLM/Qwen-VL-Chat, tokenization_qwen.py, from_list_format, to_list_format.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from vlm_jax.processors.normal_form import composed
from vlm_jax.types import Config

PICTURE = "Picture {number}: "  # some copies of the release have no space at the end

_KEYS = {"img": "image", "ref": "ref", "box": "box", "quad": "quad"}
_FORBIDDEN = re.compile(r"<\|(?:im_start|im_end|extra_\d+)\|>")


@dataclasses.dataclass(frozen=True)
class TaggedPart:
    """`<name>content</name>` at [start, end) of a text."""

    name: str
    content: str
    start: int
    end: int


def tagged_parts(text: str, names: Sequence[str]) -> Iterator[TaggedPart]:
    r"""The parts of a text between an opening tag and the nearest end tag of its name, in order, without overlaps.

    The same as the matches of `<(a|b)>(.*?)</\1>`, which takes quadratic time for tags that are not closed.
    """
    tags = list(re.finditer(f"<(/?)({'|'.join(names)})>", text))
    closing = {name: [tag for tag in reversed(tags) if tag[1] and tag[2] == name] for name in names}
    end = 0
    for tag in tags:
        if tag[1] or tag.start() < end:
            continue
        ends = closing[tag[2]]
        while ends and ends[-1].start() < tag.end():
            ends.pop()
        if ends:
            end = ends[-1].end()
            yield TaggedPart(tag[2], text[tag.end() : ends[-1].start()], tag.start(), end)


class ListFormatError(ValueError):
    """An invalid item or text of Qwen-VL's format; the message has it."""


def from_list_format(items: Sequence[Config], picture: str = PICTURE) -> str:
    """The text of `{"image": path}`, `{"text": …}` and `{"box": [[x1, y1, x2, y2], …], "ref": name}`.

    Args:
      items: in order; boxes on the scale of 1000, truncated to whole numbers, and `ref` may be missing.
      picture: text before an image, with its number in the list.

    Raises:
      ListFormatError: an item has none of these keys, or a box that is not four finite numbers.
    """
    text, number = "", 0
    for item in items:
        if "image" in item:
            number += 1
            text += f"{picture.format(number=number)}<img>{item['image']}</img>\n"
        elif "text" in item:
            text += item["text"]
        elif "box" in item:
            text += f"<ref>{item['ref']}</ref>" if "ref" in item else ""
            text += "".join(_box(box) for box in item["box"])
        else:
            raise ListFormatError(f"expected an item with the key image, text or box, got {dict(item)}")
    return text


def _box(box: Any) -> str:
    numbers = isinstance(box, Sequence) and len(box) == 4 and all(isinstance(one, float | int) for one in box)
    if not numbers or not all(abs(one) < 2**53 for one in box):
        raise ListFormatError(f"expected a box of four numbers, got {box}")
    return "<box>({:d},{:d}),({:d},{:d})</box>".format(*map(int, box))


def to_list_format(text: str) -> list[dict[str, str]]:
    """The items of a text: `{"image": path}`, `{"ref": name}`, `{"box": "(1,2),(3,4)"}`, `{"quad": …}`, `{"text": …}`.

    Raises:
      ListFormatError: the text has a token of a conversation, such as <|im_start|>.
    """
    text = composed(text)
    if found := _FORBIDDEN.search(text):
        raise ListFormatError(f"expected the text of one turn, without {found.group()}, got {text!r}")
    items, end = [], 0
    for tagged in tagged_parts(text, tuple(_KEYS)):
        items += [{"text": text[end : tagged.start]}, {_KEYS[tagged.name]: tagged.content}]
        end = tagged.end
    items.append({"text": text[end:]})
    return [item for item in items if item != {"text": ""}]

r"""Grounding outputs of models: boxes of an answer in pixels, and the blocks of documents.

| system | syntax | unit |
|---|---|---|
| Qwen-VL | `<ref>name</ref><box>(x1,y1),(x2,y2)</box>` | thousandths of the image |
| Qwen2-VL | the same with `<\|object_ref_start\|>`, `<\|box_start\|>` and their ends | thousandths |
| InternVL | `<ref>name</ref><box>[[x1, y1, x2, y2], …]</box>` | thousandths |
| DeepSeek-VL2, DeepSeek-OCR | `<\|ref\|>name<\|/ref\|><\|det\|>[[x1, y1, x2, y2], …]<\|/det\|>` | 999ths |
| Qwen2.5-VL | JSON, `[{"bbox_2d": [x1, y1, x2, y2], "label": name}]` | pixels of the model's input |
| Qwen3-VL | the same JSON | thousandths |
| PaliGemma | `<loc0000>` of top, left, bottom, right, 16 `<seg000>` of a mask, `name ; …` | 1024ths |
| Qwen2.5-VL, documents | HTML whose elements have a `data-bbox="x1 y1 x2 y2"` | the same |
"""

import dataclasses
import json
import re
from collections.abc import Sequence

from PIL import Image, ImageDraw

from vlm_jax.processors.boxes import SCALE
from vlm_jax.processors.html_tokens import EndTag, StartTag, html_tokens
from vlm_jax.processors.tiling import Size

Number = float | int
PixelBox = tuple[Number, Number, Number, Number]
COLOURS = ("red", "lime", "blue", "orange", "magenta", "cyan", "yellow", "purple")
_TAGGED = re.compile(
    r"(?:(?:<ref>|<\|object_ref_start\|>|<\|ref\|>)(?P<name>[^<]*)(?:</ref>|<\|object_ref_end\|>|<\|/ref\|>)\s*)?"
    r"(?P<tag><box>|<\|box_start\|>|<\|det\|>)(?P<box>[^<]*)(?:</box>|<\|box_end\|>|<\|/det\|>)"
)
_CORNERS = re.compile(r"\(\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\)\s*,\s*\(\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\)")
_PLACED = re.compile(r"(?P<places>(?:<loc\d{4}>){4})\s*(?P<codes>(?:<seg\d{3}>){16})?(?P<name>[^;<]*)")
NUM_PLACES, NUM_CODES = 1024, 128  # tokens of places, and of parts of masks
MAX_COORDINATE = 10**9  # larger coordinates are invalid
VOID = frozenset(("br", "hr", "img", "input", "meta", "link", "col", "wbr"))  # elements without an end


@dataclasses.dataclass(frozen=True)
class NamedBox:
    """A box in an image.

    Attributes:
      box: (left, top, right, bottom) in pixels of the image.
      name: name of its content in the answer, or None.
      mask_codes: 16 indices in the codebook of PaliGemma's masks, in [0, 128); empty where the answer has no mask. The
        decoder that makes a mask of 64x64 pixels of them is not in the released checkpoints.
    """

    box: PixelBox
    name: str | None = None
    mask_codes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Block:
    """An element of a document.

    Attributes:
      tag: tag of the HTML element, such as `h2`, `p`, `table`, `div`.
      kind: its class, such as `image` or `formula`; empty if it has none.
      text: its text without tags; table cells are separated by tabs, and table rows by line breaks.
      box: in pixels of the image; None if the element has none.
    """

    tag: str
    kind: str
    text: str
    box: PixelBox | None


def answer_boxes(text: str, size: Size, seen_size: Size | None = None) -> list[NamedBox]:
    """The boxes of an answer in any syntax of the table; malformed boxes are ignored.

    Args:
      text: the answer.
      size: (height, width) of the image, in pixels.
      seen_size: (height, width) of the image in the unit of an answer without tags, as of the model's input in pixels;
        `size` when None.
    """
    tagged = [NamedBox(_scaled(box, size, (unit, unit)), name) for box, unit, name in _tagged_boxes(text)]
    tagged += [
        NamedBox(_scaled(box, size, (NUM_PLACES, NUM_PLACES)), name, codes) for box, name, codes in _placed_boxes(text)
    ]
    return tagged or [NamedBox(_scaled(box, size, seen_size), name) for box, name in _json_boxes(text)]


def document_blocks(text: str, size: Size, seen_size: Size | None = None) -> list[Block]:
    """The outermost elements with a box of an HTML document, in order; arguments as in `answer_boxes`."""
    reader = _Reader()
    for token in html_tokens(re.sub(r"^```\w*\n|\n```\s*$", "", text.strip())):
        if isinstance(token, StartTag):
            reader.start(token)
        elif isinstance(token, EndTag):
            reader.end(token.name)
        else:
            reader.text(token)
    return [
        dataclasses.replace(block, box=None if block.box is None else _scaled(block.box, size, seen_size))
        for block in reader.finished()
    ]


def draw_boxes(picture: Image.Image, boxes: Sequence[NamedBox]) -> Image.Image:
    """A copy of the image with boxes and their names, one colour per name."""
    drawn = picture.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    width = max(1, round(max(picture.size) / 300))
    names = {name: number for number, name in enumerate(dict.fromkeys(box.name for box in boxes))}
    for box in boxes:
        colour = COLOURS[names[box.name] % len(COLOURS)]
        left, top, right, bottom = box.box
        corners = (min(left, right), min(top, bottom), max(left, right), max(top, bottom))
        # Edges out of sight stay so; Pillow would go over every pixel of a long one.
        shown = [
            min(max(value, -2 * width), side + 2 * width)
            for value, side in zip(corners, (*drawn.size, *drawn.size), strict=True)
        ]
        draw.rectangle(shown, outline=colour, width=width)
        if box.name:
            draw.text((corners[0] + width + 1, corners[1] + width), box.name, fill=colour)
    return drawn


def _scaled(box: Sequence[Number], size: Size, seen_size: Size | None) -> PixelBox:
    rows, cols = (1.0, 1.0) if seen_size is None else (size[0] / seen_size[0], size[1] / seen_size[1])
    left, top, right, bottom = box
    return left * cols, top * rows, right * cols, bottom * rows


def _tagged_boxes(text: str) -> list[tuple[Sequence[Number], int, str | None]]:
    """Boxes between tags, the side of the image in their unit, and the preceding name; malformed ones are ignored."""
    found = []
    for tagged in _TAGGED.finditer(text):
        if corners := _CORNERS.fullmatch(tagged["box"].strip()):
            boxes: object = [list(map(int, corners.groups()))]
        else:
            try:
                boxes = json.loads(tagged["box"])
            except (ValueError, RecursionError):
                continue
        name = None if tagged["name"] is None else tagged["name"].strip()
        unit = SCALE - 1 if tagged["tag"] == "<|det|>" else SCALE
        found += [(box, unit, name) for box in boxes if _is_box(box)] if isinstance(boxes, list) else []
    return found


def _placed_boxes(text: str) -> list[tuple[Sequence[Number], str | None, tuple[int, ...]]]:
    """Boxes of tokens of places, names and codes of masks; with a number that is no token, one is malformed.

    Source: Beyer et al. 2024 (PaliGemma), section 3.2.
    """
    found = []
    for placed in _PLACED.finditer(text):
        top, left, bottom, right = places = [int(number) for number in re.findall(r"\d{4}", placed["places"])]
        codes = tuple(int(number) for number in re.findall(r"\d{3}", placed["codes"] or ""))
        if max(places) < NUM_PLACES and max(codes, default=0) < NUM_CODES:
            found.append(((left, top, right, bottom), placed["name"].strip() or None, codes))
    return found


def _is_box(value: object) -> bool:
    """Whether it is four valid coordinates; Python's JSON also accepts NaN, Infinity and any number of digits."""
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_COORDINATE


def _json_boxes(text: str) -> list[tuple[list[Number], str | None]]:
    """Entries of a JSON list, in a code block or bare; of a truncated list, the complete ones."""
    found = []
    for entry in re.findall(r"\{[^{}]*\}", text):
        try:
            values = json.loads(entry)
        except (ValueError, RecursionError):
            continue
        box, label = values.get("bbox_2d"), values.get("label")
        if _is_box(box):
            found.append((box, label if isinstance(label, str) else None))
    return found


class _Reader:
    """Collects the outermost elements that have a box."""

    def __init__(self):
        self._blocks: list[Block] = []
        self._open: Block | None = None
        self._depth = 0
        self._text: list[str] = []

    def start(self, element: StartTag) -> None:
        """Of any element."""
        tag, given = element.name, element.attributes
        if self._open is not None:
            self._depth += tag not in VOID
            self._text.append({"br": "\n", "tr": "\n", "td": "\t", "th": "\t"}.get(tag, ""))
            return
        numbers = re.findall(r"-?\d+(?:\.\d+)?", given.get("data-bbox") or "")
        box = [float(number) for number in numbers]
        if not _is_box(box) or tag == "body":
            return
        left, top, right, bottom = box
        block = Block(tag, given.get("class") or "", "", (left, top, right, bottom))
        if tag in VOID:
            self._blocks.append(block)
        else:
            self._open, self._depth, self._text = block, 1, []

    def end(self, tag: str) -> None:
        """Of any element."""
        if self._open is None or tag in VOID:
            return
        self._depth -= 1
        if self._depth == 0:
            self._finish()

    def text(self, data: str) -> None:
        """Between two tags."""
        if self._open is not None:
            self._text.append(data)

    def finished(self) -> list[Block]:
        """All blocks, also one that a truncated answer does not close."""
        if self._open is not None:
            self._finish()
        return self._blocks

    def _finish(self) -> None:
        assert self._open is not None
        lines = [re.sub(r" +", " ", line).strip() for line in "".join(self._text).split("\n")]
        text = "\n".join(line for line in lines if line)
        self._blocks.append(dataclasses.replace(self._open, text=text))
        self._open = None

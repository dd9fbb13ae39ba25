"""Qwen-VL's box syntax: a rectangle of an image, written as text on a scale of 1000.

A box is (left, top, right, bottom), left and top included, right and bottom excluded, in one of
two units: pixels of an image, or thousandths of its width and height ("normalised"). As text it is
`<box>(x1,y1),(x2,y2)</box>` with four normalised integers in [0, 1000).

Source: Bai et al., "Qwen-VL", 2023, section 3.1 ("Bounding Box Input and Output"); the `<ref>` tags
that name a box's content are omitted.
"""

import math
import re
from collections.abc import Sequence

SCALE = 1000
Box = tuple[int, int, int, int]

_BOX = re.compile(r"<box>\((\d{1,3}),(\d{1,3})\),\((\d{1,3}),(\d{1,3})\)</box>")


def format_box(box_pixels: Sequence[float | int], height: int, width: int) -> str:
    """Writes a box of an image as text.

    Args:
      box_pixels: (left, top, right, bottom) in pixels.
      height: of the image, pixels, positive.
      width: of the image, pixels, positive.

    Returns:
      `<box>(x1,y1),(x2,y2)</box>`; each number is floor(1000 * x / width), or for y with the height,
      clamped to [0, 999]: a box that ends at the image's edge ends at 999.

    Raises:
      ValueError: left > right or top > bottom.
    """
    left, top, right, bottom = box_pixels
    if right < left or bottom < top:
        raise ValueError(f"expected (left, top, right, bottom) with left <= right and top <= bottom, got {box_pixels}")
    x1, y1, x2, y2 = (
        min(max(math.floor(SCALE * value / size), 0), SCALE - 1)
        for value, size in ((left, width), (top, height), (right, width), (bottom, height))
    )
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def parse_boxes(text: str) -> list[Box]:
    """The normalised boxes of a text, in order.

    Since the text comes from a model, malformed boxes (other punctuation, numbers of 1000 or more,
    left > right or top > bottom) are not errors but ignored.
    """
    boxes = []
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = (int(group) for group in match.groups())
        if x1 <= x2 and y1 <= y2:
            boxes.append((x1, y1, x2, y2))
    return boxes


def to_pixels(box: Sequence[float | int], height: int, width: int) -> tuple[float, float, float, float]:
    """Converts a normalised box to pixels of an image of `height` by `width`; fractions are kept.

    Formatting a box loses precision: less than a thousandth of the image, or exactly one
    thousandth where the box ends at the edge.
    """
    x1, y1, x2, y2 = box
    return (x1 * width / SCALE, y1 * height / SCALE, x2 * width / SCALE, y2 * height / SCALE)


def intersection_over_union(a: Sequence[float | int], b: Sequence[float | int]) -> float:
    """Intersection area of two boxes divided by the area of their union; in [0, 1].

    Args:
      a: (left, top, right, bottom), in any unit.
      b: the same, in the same unit.

    Returns:
      0.0 for boxes that do not overlap or have no area.
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

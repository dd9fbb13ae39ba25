"""Drawings on a picture: the parts that a reducer kept, with the others greyed, and the boxes of an answer."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from vlm_jax.processors.grounding import NamedBox, draw_boxes

GREY = (128, 128, 128)
STRENGTH = 0.8  # share of grey in what was dropped
OUTLINE = (255, 196, 0)
LONGEST = 1024  # pixels of a drawing's longer side


def draw(
    picture: Image.Image, *, kept: Float[np.ndarray, "kept 4"] | None = None, boxes: Sequence[NamedBox] = ()
) -> Image.Image:
    """The picture, reduced to `LONGEST` pixels, with what was kept and boxes.

    Args:
      picture: in any mode.
      kept: (left, top, right, bottom) of the kept parts in pixels of the picture; None leaves the picture as it is.
      boxes: of the answer, in pixels of the picture.
    """
    factor = min(1.0, LONGEST / max(picture.size))
    if factor < 1:
        width, height = (max(1, round(side * factor)) for side in picture.size)
        picture = picture.resize((width, height))
    picture = picture.convert("RGB")
    if kept is not None:
        picture = draw_kept(picture, kept * factor)
    scaled = []
    for one in boxes:
        left, top, right, bottom = (edge * factor for edge in one.box)
        scaled.append(NamedBox((left, top, right, bottom), one.name))
    return draw_boxes(picture, scaled)


def draw_kept(picture: Image.Image, boxes: Float[np.ndarray, "kept 4"]) -> Image.Image:
    """A copy of the picture that is grey outside of the boxes, each of which has an outline.

    Args:
      picture: in RGB.
      boxes: (left, top, right, bottom) in pixels; rounded to whole ones.
    """
    drawn = Image.blend(picture, Image.new("RGB", picture.size, GREY), STRENGTH)
    corners = np.rint(boxes).astype(int).tolist()
    for left, top, right, bottom in corners:
        if right > left and bottom > top:
            drawn.paste(picture.crop((left, top, right, bottom)), (left, top))
    draw = ImageDraw.Draw(drawn)
    for left, top, right, bottom in corners:
        if right - left > 3 and bottom - top > 3:  # smaller ones would be nothing but outline
            draw.rectangle((left, top, right - 1, bottom - 1), outline=OUTLINE)
    return drawn

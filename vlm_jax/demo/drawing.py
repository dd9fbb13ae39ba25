"""Drawings on a picture: the parts that a reducer kept, with the others greyed."""

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

GREY = (128, 128, 128)
STRENGTH = 0.8  # share of grey in what was dropped
OUTLINE = (255, 196, 0)
LONGEST = 1024  # pixels of a drawing's longer side


def shown(picture: Image.Image) -> tuple[Image.Image, float]:
    """The picture in RGB, reduced to `LONGEST` pixels, and the factor of its sides."""
    factor = min(1.0, LONGEST / max(picture.size))
    if factor < 1:
        picture = picture.resize([max(1, round(side * factor)) for side in picture.size])  # type: ignore[arg-type]
    return picture.convert("RGB"), factor


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

"""Characters rendered from the TrueType fonts that ship inside matplotlib.

FreeType draws them anti-aliased, and hinted to whole pixels, as on the screen; PIL moves them by whole pixels only.

Source: DejaVu and STIX fonts and the BaKoMa Computer Modern fonts, matplotlib/mpl-data/fonts/ttf, with their licenses.
"""

import dataclasses
import functools
import importlib.util
import pathlib

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from vlm_jax.config import ConfigError, did_you_mean
from vlm_jax.data.scans import ink_boxes

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SMALLEST_EM = 4  # pixels
NOWHERE = "\uffff"  # no font has it, so that its picture is that of a missing character
SYMBOL_FONTS = ("cmex10", "cmsy10")  # which have delimiters and operators in the places of letters
ORIGIN = "ls"  # PIL's name for the left end of the base line


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """All characters of one font in a cell of one size.

    Attributes:
      em: size of the font, pixels.
      pixels: 0 is paper, 255 is ink; the cell with `overhang` more columns on its left and on its right.
      boxes: (left, top, right, bottom) of each character's ink, pixels from the cell's left upper corner, right and
        bottom excluded.
      overhang: columns that the ink of a slanted character may take of a neighbouring cell, pixels.
    """

    em: int
    pixels: UInt8[np.ndarray, "36 height width"]
    boxes: Int[np.ndarray, "36 4"]
    overhang: int


@functools.cache
def font_folder() -> pathlib.Path:
    """The folder of matplotlib's fonts, found without importing it, which takes as long as rendering."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the fonts are files of matplotlib; install it: pip install matplotlib")
    return pathlib.Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"


@functools.cache
def font_names() -> tuple[str, ...]:
    """Names of the fonts that have all characters, such as `DejaVuSansMono`, in alphabetic order."""
    names = {path.stem for path in font_folder().glob("*.ttf")}.difference(SYMBOL_FONTS)
    return tuple(name for name in sorted(names) if _is_complete(load_font(name, 16)))


def load_font(name: str, em: int) -> ImageFont.FreeTypeFont:
    """A font at a size.

    Args:
      name: of its file, without `.ttf`.
      em: pixels.
    """
    path = font_folder() / f"{name}.ttf"
    return ImageFont.truetype(str(path), em, layout_engine=ImageFont.Layout.BASIC)


def _is_complete(font: ImageFont.FreeTypeFont) -> bool:
    em = int(font.size)
    missing, *pictures = [_drawn(font, text, (em, 2 * em), (3 * em, 3 * em)) for text in (NOWHERE, *CHARACTERS)]
    known = {picture.tobytes() for picture in pictures}
    return len(known) == len(CHARACTERS) and missing.tobytes() not in known and all(map(np.any, pictures))


def check_fonts(names: tuple[str, ...], path: str) -> None:
    """Raises a ConfigError for a font without all characters.

    Args:
      names: of the fonts.
      path: of their key in the config.
    """
    for name in names:
        if name not in font_names():
            raise ConfigError(
                f"{path}: matplotlib has no font '{name}' of all characters{did_you_mean(name, font_names())}"
            )


@functools.lru_cache(maxsize=256)
def render_glyphs(name: str, height: int, width: int) -> Glyphs:
    """The characters of a font at the largest size whose characters all fit in the cell.

    They fit where no advance is wider than the cell, and where the ink from the highest to the lowest is not higher.
    Every character is centred by its advance, to whole pixels; all stand on one base line, such that the ink of all
    together is centred in the cell.

    Args:
      name: of `font_names`.
      height: of the cell, pixels.
      width: of the cell, pixels.

    Raises:
      ConfigError: no size fits, or at that size two characters have the same picture.
    """
    where = f"config.data.grids: a cell of {height}x{width} pixels"
    for em in range(2 * height, SMALLEST_EM - 1, -1):
        font = load_font(name, em)
        # Columns of PIL's boxes are those of ink and advance together; rows are those of ink.
        boxes = [font.getbbox(character, anchor=ORIGIN) for character in CHARACTERS]
        top, bottom = int(min(box[1] for box in boxes)), int(max(box[3] for box in boxes))
        advances = np.array([font.getlength(character) for character in CHARACTERS])
        if advances.max() <= width and bottom - top <= height:
            break
    else:
        raise ConfigError(f"{where} is too small for the font {name}; enlarge page_size, or have fewer rows or columns")
    left, base = np.rint((width - advances) / 2).astype(int), (height - (bottom - top)) // 2 - top
    size = (height, width + 2 * em)  # no ink is further outside
    wide = np.stack(
        [_drawn(font, text, (em + start, base), size) for text, start in zip(CHARACTERS, left.tolist(), strict=True)]
    )
    boxes = ink_boxes(wide) - np.array([em, 0, em, 0])
    overhang = int(max(0, -boxes[:, 0].min(), boxes[:, 2].max() - width))
    pixels = wide[:, :, em - overhang : em + width + overhang]
    _check_distinct(pixels, f"{where} in the font {name} at {em} pixels")
    return Glyphs(em, pixels, boxes, overhang)


def _drawn(
    font: ImageFont.FreeTypeFont, character: str, origin: tuple[int, int], size: tuple[int, int]
) -> UInt8[np.ndarray, "height width"]:
    height, width = size
    picture = Image.new("L", (width, height))
    ImageDraw.Draw(picture).text(origin, character, fill=255, font=font, anchor=ORIGIN)
    return np.asarray(picture)


def _check_distinct(pixels: UInt8[np.ndarray, "36 height width"], where: str) -> None:
    seen: dict[bytes, str] = {}
    for character, picture in zip(CHARACTERS, pixels, strict=True):
        other = seen.setdefault(picture.tobytes(), character)
        if other != character:
            raise ConfigError(f"{where} shows '{other}' and '{character}' alike; enlarge page_size, or omit the font")

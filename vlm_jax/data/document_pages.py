"""Pages of printed text: one character per cell of a regular grid, in one font at one size.

The characters are drawn uniformly and independently, so that no knowledge of language helps to read them: what is not
in the visual tokens can only be guessed, with one chance in 36.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vlm_jax.data.drawing import Weathering
from vlm_jax.data.glyphs import CHARACTERS, Glyphs, render_glyphs
from vlm_jax.data.pages import Page
from vlm_jax.types import Grid


class DocumentPages:
    """Composes pages of several text sizes, by copying stored renderings: some tenths of a millisecond each."""

    def __init__(
        self,
        *,
        grids: Sequence[Grid],
        page_size: int,
        fonts: Sequence[str],
        jitter: int = 0,
        intensity: float = 0.0,
        noise: float = 0.0,
    ):
        """Renders the fonts at the size of each grid, or reuses those of an earlier call.

        Args:
          grids: rows and columns of the text, of each size; they divide the page.
          page_size: side of the square page, pixels.
          fonts: names of `glyphs.font_names`.
          jitter: a line is shifted by at most this many pixels to each side, and up or down.
          intensity: as of `drawing.Weathering`.
          noise: likewise.

        Raises:
          ConfigError: a cell is too small for a font.
        """
        self._page_size, self._jitter = page_size, jitter
        self._weather = Weathering(page_size, intensity, noise)
        self._glyphs: dict[Grid, list[Glyphs]] = {
            (rows, cols): [render_glyphs(font, page_size // rows, page_size // cols) for font in fonts]
            for rows, cols in grids
        }

    def compose(self, rng: np.random.Generator, grid: Grid) -> Page:
        """Generates one page of text; all random choices are uniform.

        Args:
          rng: drawn from in this order: font, characters, shifts of lines, weather.
          grid: one of `grids`.

        Returns:
          The page, whose classes are indices into CHARACTERS. Where a character's ink is cut off by the page's edge,
          its box is too.
        """
        (rows, cols), size, margin = grid, self._page_size, self._jitter
        fonts = self._glyphs[grid]
        glyphs = fonts[int(rng.random() * len(fonts))]
        classes = (rng.random(grid) * len(CHARACTERS)).astype(np.int64)
        shifts = rng.integers(-margin, margin, (rows, 2), endpoint=True)  # x, y
        height, width, edge = size // rows, size // cols, margin + glyphs.overhang
        corners = np.stack(np.meshgrid(np.arange(cols) * width, np.arange(rows) * height), axis=-1)
        corners = corners + shifts[:, None]

        wide = np.zeros((size + 2 * edge, size + 2 * edge), np.uint8)
        places = (corners + np.array([edge - glyphs.overhang, edge])).reshape(-1, 2).tolist()
        for (x, y), which in zip(places, classes.ravel().tolist(), strict=True):
            target = wide[y : y + height, x : x + width + 2 * glyphs.overhang]
            np.maximum(target, glyphs.pixels[which], out=target)  # the ink of neighbours may overlap
        pixels = wide[edge : edge + size, edge : edge + size]
        boxes = glyphs.boxes[classes] + np.concatenate([corners, corners], axis=-1)
        return Page(self._weather(pixels, rng)[:, :, None], classes, np.clip(boxes, 0, size))


def text_of_page(page: Page) -> str:
    """The page's characters in reading order, without separators."""
    return "".join(CHARACTERS[index] for index in page.classes.ravel().tolist())


def finer(page: Page, grid: Grid) -> Page:
    """The page with the class and the box of each cell repeated for the cells of a finer grid that it covers.

    Args:
      page: of any grid.
      grid: rows and columns; multiples of the page's.
    """
    rows, cols = (fine // own for fine, own in zip(grid, page.classes.shape, strict=True))
    return dataclasses.replace(
        page,
        classes=page.classes.repeat(rows, 0).repeat(cols, 1),
        boxes=page.boxes.repeat(rows, 0).repeat(cols, 1),
    )

"""Pages of handwritten digits: one digit per cell, at a random size and position in it."""

import dataclasses

import numpy as np
from jaxtyping import Int, UInt8

from vlm_jax.config import ConfigError
from vlm_jax.data.drawing import Weathering
from vlm_jax.data.scans import NUM_CLASSES, Split, render

MAX_SIZES = 8  # renderings are stored in at most this many sizes, evenly spaced


@dataclasses.dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
      pixels: 0 is paper, 255 is ink.
      classes: the digit in the cell at (row, column).
      boxes: (left, top, right, bottom) of the ink of that digit in pixels of the page, right and
        bottom excluded.
    """

    pixels: UInt8[np.ndarray, "height width 1"]
    classes: Int[np.ndarray, "R C"]
    boxes: Int[np.ndarray, "R C 4"]


class DigitPages:
    """Composes pages from the scans of one split.

    A page is composed by copying stored renderings, which takes some tens of
    microseconds.
    """

    def __init__(
        self,
        split: Split,
        *,
        rows: int,
        cols: int,
        page_size: int,
        min_digit: int,
        max_digit: int,
        variants: int = 0,
        intensity: float = 0.0,
        noise: float = 0.0,
    ):
        """Renders the scans of `split`, or reuses those of an earlier call.

        Args:
          split: "train" or "test".
          rows: rows of cells, R.
          cols: columns of cells, C.
          page_size: side of the square page, pixels.
          min_digit: smallest side of a pasted digit, pixels; its ink may be narrower.
          max_digit: largest side, pixels; must fit in the smallest cell.
          variants: warped copies of every scan, in addition to the scan.
          intensity: a page's ink is multiplied by a number in [1 - intensity, 1].
          noise: a page's noise is normal, with a standard deviation in [0, noise] grey levels of 255.

        Raises:
          ConfigError: an invalid value; names its key under config.data.
        """
        for key, value in (("rows", rows), ("cols", cols), ("min_digit", min_digit)):
            if value < 1:
                raise ConfigError(f"config.data.{key}: expected at least 1, got {value}")
        if max_digit < min_digit:
            raise ConfigError(f"config.data.max_digit: {max_digit} is below min_digit, {min_digit}")
        cell = min(page_size // rows, page_size // cols)
        if max_digit > cell:
            raise ConfigError(
                f"config.data.max_digit: a digit of {max_digit} pixels does not fit in a cell of {cell} "
                f"({rows}x{cols} cells on {page_size} pixels); set it to {cell} or less, or enlarge page_size"
            )
        if variants < 0:
            raise ConfigError(f"config.data.variants: expected 0 or more, got {variants}")
        if not 0.0 <= intensity < 1.0:
            raise ConfigError(f"config.data.intensity: expected a fraction in [0, 1), got {intensity}")
        if noise < 0.0:
            raise ConfigError(f"config.data.noise: expected 0 or more grey levels, got {noise}")
        self.rows, self.cols, self.page_size = rows, cols, page_size
        self._weather = Weathering(page_size, intensity, noise)
        spread = np.linspace(min_digit, max_digit, min(MAX_SIZES, max_digit - min_digit + 1))
        self._renderings = render(split, tuple(int(size) for size in np.rint(spread)), variants)
        self._sizes = np.array(self._renderings.sizes)
        row, col = np.divmod(np.arange(rows * cols), cols)
        self._corner = np.stack([col * page_size // cols, row * page_size // rows])  # x, y of each cell
        end = np.stack([(col + 1) * page_size // cols, (row + 1) * page_size // rows])
        self._extent = end - self._corner

    @property
    def cell_boxes(self) -> Int[np.ndarray, "R C 4"]:
        """(left, top, right, bottom) of every cell, pixels, right and bottom excluded."""
        return np.concatenate([self._corner, self._corner + self._extent]).T.reshape(self.rows, self.cols, 4)

    def compose(self, rng: np.random.Generator) -> Page:
        """Generates one page; all random choices are uniform.

        Digits are sampled first, then one of the digit's scans (and variants), so that the classes are
        balanced. The size is the side of the pasted square; offsets keep the square in its cell.
        """
        table = self._renderings
        digit, scan, scale, *offset = rng.random((5, self.rows * self.cols))
        classes = (digit * NUM_CLASSES).astype(np.int64)
        chosen = table.first[classes] + (scan * table.count[classes]).astype(np.int64)
        size_index = (scale * len(self._sizes)).astype(np.int64)
        size = self._sizes[size_index]
        place = self._corner + (np.stack(offset) * (self._extent - size + 1)).astype(np.int64)  # x, y
        boxes = table.boxes[size_index, chosen] + np.concatenate([place, place]).T

        pixels = np.zeros((self.page_size, self.page_size), np.uint8)
        for x, y, side, which, row in zip(*(a.tolist() for a in (*place, size, size_index, chosen)), strict=True):
            pixels[y : y + side, x : x + side] = table.pixels[which][row]
        grid = (self.rows, self.cols)
        return Page(self._weather(pixels, rng)[:, :, None], classes.reshape(grid), boxes.reshape(*grid, 4))

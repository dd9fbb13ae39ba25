"""The 1,797 handwritten digit scans that ship inside scikit-learn, split, warped and scaled.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998; the scans are
8x8 pixels with 17 grey levels.
"""

import dataclasses
import functools
import importlib.util
import math
import pathlib
from typing import Literal

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

Split = Literal["train", "test"]
NUM_CLASSES = 10
SCAN_SIZE = 8
TEST_EVERY = 5  # every fifth scan of a class, in the order of the file, is for testing
FAINTEST_INK = 24  # of 255: paler pixels of a rendered scan are set to 0, so that its box is meaningful

# Limits of warped variants: plausible handwriting.
MAX_ROTATION = math.radians(10.0)
MAX_SHEAR = 0.15
SMALLEST_SCALE = 0.85
PALEST = 0.7  # ink of the palest variant, as a fraction of the scan's


@dataclasses.dataclass(frozen=True)
class Scans:
    """Scans of one split, sorted by class.

    Attributes:
      pixels: 0 is paper, 255 is ink.
      classes: the digit of each scan.
    """

    pixels: UInt8[np.ndarray, "n 8 8"]
    classes: Int[np.ndarray, "n"]


@functools.cache
def load_scans(split: Split) -> Scans:
    """The scans of a split.

    The split is fixed, without a seed: every fifth scan of every class (20%) is in the test split,
    the others in the training split.
    """
    table = _read_table()
    levels, classes = table[:, :-1], table[:, -1].astype(int)
    grey = np.rint(levels * (255 / 16)).astype(np.uint8).reshape(-1, SCAN_SIZE, SCAN_SIZE)
    chosen = []
    for digit in range(NUM_CLASSES):
        scans = np.flatnonzero(classes == digit)
        for_test = np.arange(len(scans)) % TEST_EVERY == TEST_EVERY - 1
        chosen.append(scans[for_test if split == "test" else ~for_test])
    order = np.concatenate(chosen)
    return Scans(pixels=grey[order], classes=classes[order])


def _read_table() -> np.ndarray:
    """The 64 grey levels and the class of every scan, from scikit-learn's file.

    `sklearn.datasets.load_digits` reads the same file, but importing it takes two seconds, as much as all of JAX.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the digit scans are a file of scikit-learn; install it: pip install scikit-learn")
    return np.loadtxt(pathlib.Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")


@dataclasses.dataclass(frozen=True)
class Renderings:
    """Every scan of a split in every variant and size.

    The renderings of a class are consecutive: those of digit c are first[c] to first[c] + count[c] - 1.

    Attributes:
      sizes: side of the square renderings of each table, pixels, ascending.
      pixels: one table per size; pixels paler than FAINTEST_INK are 0.
      boxes: (left, top, right, bottom) of each rendering's ink in each table, pixels, right and
        bottom excluded.
      first: first rendering of each class.
      count: number of renderings of each class.
    """

    sizes: tuple[int, ...]
    pixels: tuple[UInt8[np.ndarray, "n _ _"], ...]
    boxes: Int[np.ndarray, "sizes n 4"]
    first: Int[np.ndarray, "10"]
    count: Int[np.ndarray, "10"]


@functools.lru_cache(maxsize=8)
def render(split: Split, sizes: tuple[int, ...], variants: int) -> Renderings:
    """Renders the scans of a split, once for all pages.

    Args:
      split: "train" or "test".
      sizes: sides in pixels, ascending.
      variants: warped copies of each scan, in addition to the scan; the warps have a
        fixed seed, so that a page depends only on the run's seed.
    """
    scans = load_scans(split)
    rng = np.random.default_rng(0)
    tables: list[list[np.ndarray]] = [[] for _ in sizes]
    for scan in scans.pixels:
        picture = Image.fromarray(scan)
        warps = [_random_warp(rng) for _ in range(variants)]
        inks = 1.0 - (1.0 - PALEST) * rng.random(variants)
        for table, size in zip(tables, sizes, strict=True):
            table.append(np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)))
            for warp, ink in zip(warps, inks, strict=True):
                table.append(_warped(picture, warp, size) * ink)
    pixels = tuple(_without_faint(np.stack(table)) for table in tables)
    count = np.bincount(scans.classes, minlength=NUM_CLASSES) * (1 + variants)
    return Renderings(
        sizes=sizes,
        pixels=pixels,
        boxes=np.stack([ink_boxes(table) for table in pixels]),
        first=np.concatenate([[0], np.cumsum(count)[:-1]]),
        count=count,
    )


def _random_warp(rng: np.random.Generator) -> np.ndarray:
    """The 2x2 matrix from a rendering's coordinates to its scan's, both centred, in the same unit."""
    angle = rng.uniform(-MAX_ROTATION, MAX_ROTATION)
    shear = rng.uniform(-MAX_SHEAR, MAX_SHEAR)
    scale = rng.uniform(SMALLEST_SCALE, 1.0, size=2)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return np.linalg.inv(rotation @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag(scale))


def _warped(picture: Image.Image, warp: np.ndarray, size: int) -> np.ndarray:
    """The scan warped about its centre and scaled to size x size pixels."""
    matrix = warp * (SCAN_SIZE / size)
    shift = SCAN_SIZE / 2 - matrix @ np.array([size / 2, size / 2])
    coefficients = (*matrix[0], shift[0], *matrix[1], shift[1])
    return np.asarray(picture.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC))


def _without_faint(pixels: np.ndarray) -> UInt8[np.ndarray, "n size size"]:
    grey = np.rint(pixels).astype(np.uint8)
    grey[grey < FAINTEST_INK] = 0
    return grey


def ink_boxes(pixels: UInt8[np.ndarray, "n height width"]) -> Int[np.ndarray, "n 4"]:
    """The tight bounding box (left, top, right, bottom) of the nonzero pixels, right and bottom excluded."""
    _, height, width = pixels.shape
    cols, rows = pixels.max(axis=1) > 0, pixels.max(axis=2) > 0
    return np.stack(
        [cols.argmax(1), rows.argmax(1), width - cols[:, ::-1].argmax(1), height - rows[:, ::-1].argmax(1)],
        axis=1,
    )

"""Pages of digits: where the ink is, which digits there are, and which pages cannot be made."""

import numpy as np
import pytest

from vlm_jax.config import ConfigError
from vlm_jax.data.pages import DigitPages
from vlm_jax.data.scans import load_scans, render

# 50 pixels do not divide by 3 or 4: cells are 16 or 17 pixels high and 12 or 13 wide.
PAGE = {"rows": 3, "cols": 4, "page_size": 50, "min_digit": 8, "max_digit": 12}
ROW_EDGES, COL_EDGES = [0, 16, 33, 50], [0, 12, 25, 37, 50]


def some_pages(count: int, split: str = "test", **options):
    composer = DigitPages(split, **PAGE, **options)
    return [composer.compose(np.random.default_rng(seed)) for seed in range(count)]


def test_a_box_is_the_tight_hull_of_all_ink_in_its_cell():
    for page in some_pages(20):
        for row in range(3):
            for col in range(4):
                top, left = ROW_EDGES[row], COL_EDGES[col]
                cell = page.pixels[top : ROW_EDGES[row + 1], left : COL_EDGES[col + 1], 0]
                ys, xs = np.nonzero(cell)
                hull = [left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1]
                assert page.boxes[row, col].tolist() == hull


def test_the_ink_of_a_box_is_a_rendering_of_a_scan_of_its_class():
    table = render("test", (8, 9, 10, 11, 12), 0)
    crops = {}
    for pixels, boxes in zip(table.pixels, table.boxes, strict=True):
        for scan, (x1, y1, x2, y2), digit in zip(pixels, boxes, load_scans("test").classes, strict=True):
            crop = np.ascontiguousarray(scan[y1:y2, x1:x2])
            crops.setdefault((crop.shape, crop.tobytes()), set()).add(int(digit))
    for page in some_pages(20):
        for (x1, y1, x2, y2), digit in zip(page.boxes.reshape(-1, 4), page.classes.ravel(), strict=True):
            crop = np.ascontiguousarray(page.pixels[y1:y2, x1:x2, 0])
            assert int(digit) in crops[crop.shape, crop.tobytes()]


def test_every_class_size_and_offset_comes_up_evenly():
    pages = some_pages(400)
    classes = np.concatenate([page.classes.ravel() for page in pages])
    # 4,800 draws, 480 expected of each class with a standard deviation of 21: five of them.
    assert np.abs(np.bincount(classes, minlength=10) - 480).max() < 105
    boxes = np.concatenate([page.boxes.reshape(-1, 4) for page in pages])
    heights = boxes[:, 3] - boxes[:, 1]
    assert set(range(8, 13)) <= set(heights.tolist())
    tops = boxes[:, 1].reshape(400, 3, 4)[:, 0, 0]
    assert {0, 1, 2, 3, 4, 5, 6, 7, 8} <= set(tops.tolist())  # the smallest digit has the widest choice


def test_a_page_depends_on_its_generator_alone():
    composer = DigitPages("train", **PAGE, variants=1, intensity=0.2, noise=5.0)
    first = composer.compose(np.random.default_rng(7))
    composer.compose(np.random.default_rng(8))
    again = composer.compose(np.random.default_rng(7))
    for field in ("pixels", "classes", "boxes"):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))


def test_paler_ink_only_scales_the_page_down():
    plain, pale = some_pages(10), some_pages(10, intensity=0.4)
    factors = []
    for ours, theirs in zip(plain, pale, strict=True):
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
        ratio = theirs.pixels.max() / ours.pixels.max()
        np.testing.assert_allclose(theirs.pixels, ours.pixels * ratio, atol=1.01)
        factors.append(ratio)
    assert 0.59 < min(factors) < max(factors) <= 1.0


def test_noise_has_at_most_the_deviation_asked_for():
    deviations = []
    for ours, theirs in zip(some_pages(10), some_pages(10, noise=20.0), strict=True):
        middle = (ours.pixels > 80) & (ours.pixels < 175)  # nowhere near the ends of the scale
        deviations.append(np.std(theirs.pixels[middle].astype(float) - ours.pixels[middle]))
    assert max(deviations) < 22.0
    assert max(deviations) > 10.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"max_digit": 13},
            r"config\.data\.max_digit: a digit of 13 pixels does not fit in a cell of 12 \(3x4",
        ),
        ({"max_digit": 7}, r"config\.data\.max_digit: 7 is below min_digit, 8"),
        ({"rows": 0}, r"config\.data\.rows: expected at least 1, got 0"),
        ({"cols": -1}, r"config\.data\.cols: expected at least 1"),
        ({"min_digit": 0}, r"config\.data\.min_digit: expected at least 1"),
        ({"variants": -1}, r"config\.data\.variants: expected 0 or more"),
        ({"intensity": 1.0}, r"config\.data\.intensity: expected a fraction in \[0, 1\)"),
        ({"noise": -1.0}, r"config\.data\.noise: expected 0 or more"),
    ],
)
def test_a_page_that_cannot_be_is_refused_by_its_key(change, message):
    with pytest.raises(ConfigError, match=message):
        DigitPages("test", **{**PAGE, **change})

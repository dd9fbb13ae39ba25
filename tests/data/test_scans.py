"""The split of the scans, by their pixels, and what a rendering keeps of a scan."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from vlm_jax.data.scans import load_scans, render


def contents(pixels: np.ndarray) -> set[bytes]:
    return {scan.tobytes() for scan in pixels}


def test_train_and_test_share_no_scan_and_leave_none_out():
    train, test = load_scans("train"), load_scans("test")
    ours, theirs = contents(train.pixels), contents(test.pixels)
    assert not ours & theirs
    archive = np.rint(load_digits().images / 16 * 255).astype(np.uint8)
    assert ours | theirs == contents(archive)
    assert len(train.pixels) + len(test.pixels) == 1797


def test_a_fifth_of_every_class_is_held_back():
    every = np.bincount(load_digits().target)
    held_back = np.bincount(load_scans("test").classes)
    np.testing.assert_array_equal(held_back, every // 5)
    np.testing.assert_array_equal(np.bincount(load_scans("train").classes), every - every // 5)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_scan_keeps_its_class(split):
    data = load_digits()
    class_of = {scan.tobytes(): label for scan, label in zip(data.images, data.target, strict=True)}
    scans = load_scans(split)
    grey_levels = np.rint(scans.pixels / 255 * 16)
    assert [class_of[scan.tobytes()] for scan in grey_levels] == scans.classes.tolist()


def test_renderings_of_a_class_are_neighbours_and_counted():
    table = render("test", (8, 12), 2)
    classes = load_scans("test").classes
    assert table.count.tolist() == [3 * int((classes == digit).sum()) for digit in range(10)]
    assert table.first.tolist() == [sum(table.count[:digit]) for digit in range(10)]
    assert [pixels.shape for pixels in table.pixels] == [(3 * len(classes), size, size) for size in (8, 12)]


def test_the_first_rendering_of_each_scan_at_its_own_size_is_the_scan():
    scans = load_scans("test").pixels
    rendered = render("test", (8, 12), 2).pixels[0][::3]
    np.testing.assert_array_equal(rendered, np.where(scans < 24, 0, scans))


def test_boxes_are_as_tight_as_the_ink():
    table = render("test", (8, 12), 2)
    for pixels, boxes in zip(table.pixels, table.boxes, strict=True):
        for scan, box in zip(pixels, boxes, strict=True):
            rows, cols = np.nonzero(scan)
            assert box.tolist() == [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]


def test_warped_renderings_stay_legible_to_a_nearest_neighbour():
    # scikit-learn's nearest neighbour reads about 98% of unseen scans; warped ones must not be far off.
    train, test = load_scans("train"), render("test", (8,), 2)
    reader = KNeighborsClassifier(1).fit(train.pixels.reshape(len(train.pixels), -1) / 255, train.classes)
    shown = np.repeat(np.arange(10), test.count)
    read = reader.predict(test.pixels[0].reshape(len(shown), -1) / 255)
    plain = np.arange(len(shown)) % 3 == 0
    assert np.mean(read[plain] == shown[plain]) > 0.96
    assert np.mean(read[~plain] == shown[~plain]) > 0.8

"""Sizes of blocks against what the definition promises."""

import math

import pytest

from vlm_jax.processors.image import CorruptImage
from vlm_jax.processors.smart_resize import bounded_size, ovis_size, qwen_size

SIZES = [(1, 1), (30, 41), (14, 70), (1000, 700), (33, 6000), (57, 57), (2000, 3000)]


@pytest.mark.parametrize("rule", [qwen_size, ovis_size])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_whole_blocks_within_the_limits(rule, size):
    if rule is ovis_size and size == (33, 6000):
        assert rule(size, 28, 56 * 56, 280 * 280)[0] == 0  # as in the release
        return
    height, width = rule(size, 28, 56 * 56, 280 * 280)
    assert height % 28 == width % 28 == 0
    assert min(height, width) >= 28
    # A single row or column of blocks may be longer than the limit.
    assert height * width >= 56 * 56
    assert height * width <= 280 * 280 or min(height, width) == 28
    if min(size) > 28 and max(size) < 20 * min(size):
        assert height / width == pytest.approx(size[0] / size[1], rel=0.5)


def test_a_size_in_between_is_rounded():
    assert qwen_size((43, 41), 28, 0, 10**6) == (56, 28)  # 1.54 and 1.46 blocks
    assert qwen_size((70, 98), 28, 0, 10**6) == (56, 112)  # halves go to the even number


def test_thin_pictures():
    with pytest.raises(CorruptImage, match="10x2001 pixels: one side is more than 200 times"):
        qwen_size((10, 2001), 28, 0, 10**9)
    assert ovis_size((28, 28 * 300), 28, 0, 10**9) == (28, 28 * 200)
    assert ovis_size((7, 100), 28, 0, 10**9) == (28, 14 * 28 + 8 // 28 * 28)


BOUNDED = [(1, 1), (48, 48), (47, 200), (1000, 31), (3, 900), (640, 480), (28, 2800), (14, 14), (4000, 4000)]


@pytest.mark.parametrize("unit", [14, 28])
@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 4), (4, 4), (4, 16), (6, 25), (64, 256)])
def test_no_picture_has_more_pixels_than_it_may(unit, least, most):
    """Limits are given in pixels of so many blocks."""
    for height, width in BOUNDED:
        size = bounded_size((height, width), unit, least * unit**2, most * unit**2)
        assert size[0] % unit == size[1] % unit == 0
        rows, cols = size[0] // unit, size[1] // unit
        assert rows >= 1 and cols >= 1 and rows * cols <= most
        natural = max(1, round(height / unit)) * max(1, round(width / unit))
        if least <= natural <= most:
            assert rows * cols == natural
        if natural > most and min(rows, cols) > 1:  # about as large as may be: a side more would be too many
            scale = math.sqrt(most / (height * width))
            assert (rows, cols) == (math.floor(height * scale + 1e-9), math.floor(width * scale + 1e-9))


@pytest.mark.parametrize(
    ("size", "least", "most", "expected"),
    [
        ((14, 14), 4, 16, (2, 2)),
        ((14, 28), 8, 16, (2, 4)),
        ((14, 28), 7, 16, (2, 4)),  # sqrt(3.5) by sqrt(14), up
        ((10, 30), 4, 4, (1, 3)),  # up would be 2x4: down again, to sqrt(4 / 3) by sqrt(12)
    ],
)
def test_a_small_picture_grows_to_its_least(size, least, most, expected):
    found = bounded_size(size, 14, least * 14**2, most * 14**2)
    assert found == (expected[0] * 14, expected[1] * 14)

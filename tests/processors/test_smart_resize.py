"""Sizes of blocks against what the definition promises."""

import pytest

from vlm_jax.processors.image import CorruptImage
from vlm_jax.processors.smart_resize import ovis_size, qwen_size

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

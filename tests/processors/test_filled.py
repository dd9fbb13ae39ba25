"""Images that fill a number of visual tokens; sizes are compared with transformers in `tests/parity`."""

import pytest

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.processors.filled import FilledViews, filled_size
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.views import ItemSize, PictureMismatch
from vlm_jax.types import PatchFormat

from ..advice import tried

FORMAT = PatchFormat(4, merge_size=3, channels_last=True)
VIEWS = FilledViews(Pixels(), FORMAT, filled_size, 0, 8 * 144, budgets=(8, 32))


def tokens(views, *size):
    return len(views.layouts([size])[0])


def test_an_image_of_any_size_fills_the_number():
    """By the rule in words: sides in the image's ratio with that area, rounded down to blocks, at least one."""
    for size, grid in (((10, 20), (2, 4)), ((1000, 2000), (2, 4)), ((30, 30), (2, 2)), ((5, 500), (1, 8))):
        assert filled_size(size, 12, 0, 8 * 144) == (12 * grid[0], 12 * grid[1])
        assert tokens(VIEWS, *size) == grid[0] * grid[1]
        assert filled_size(size[::-1], 12, 0, 8 * 144) == (12 * grid[1], 12 * grid[0])


def test_numbers_of_the_release_may_be_larger_and_others_are_bounds():
    assert tokens(VIEWS.of_budget(32), 10, 20) == 4 * 8
    assert tokens(VIEWS.of_budget(33), 10, 20) == tokens(VIEWS.within(32), 10, 20) == 8
    assert tokens(VIEWS.of_budget(2), 10, 20) == 2
    with pytest.raises(InfeasibleBudget):
        VIEWS.of_budget(0)


def test_an_item_has_no_size_of_its_own():
    assert VIEWS.sized(ItemSize()) is VIEWS
    with pytest.raises(
        PictureMismatch,
        match=tried(
            "{}: this system's images fill a number of visual tokens; remove the key from the item, and set "
            "max_visual_tokens or max_video_tokens, or token_budget for a larger number"
        ),
    ):
        VIEWS.sized(ItemSize(max_pixels=288))
    assert tokens(VIEWS.sized(ItemSize()).within(2), 10, 20) == 2

"""Views of a whole and a mosaic of tiles: modes by a bound, and the order of a row's visual table."""

import numpy as np
import pytest
from PIL import Image

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.pretrained.processing.deepseek_ocr import mode
from vlm_jax.processors.mosaic import Mosaic, MosaicViews
from vlm_jax.processors.pixels import Pixels
from vlm_jax.types import WholesAndTiles

from ..advice import tried

MODES = tuple(mode(Pixels(), side, side, False) for side in (512, 640, 1024, 1280))
GUNDAM = MosaicViews(Pixels(), 1024, (16, 16), mosaic=Mosaic(640, (10, 10)), modes=MODES)


@pytest.mark.parametrize(
    ("bound", "side", "stretched", "most_tiles"),
    [
        (64, 512, True, 0),  # the modes of the release, Wei et al. 2025, table 1
        (100, 640, True, 0),
        (255, 640, True, 0),
        (256, 1024, False, 0),
        (400, 1280, False, 0),
        (455, 1280, False, 0),
        (456, 1024, False, 2),
        (1156, 1024, False, 9),
        (9999, 1024, False, 9),
    ],
)
def test_a_bound_chooses_a_mode(bound, side, stretched, most_tiles):
    found = GUNDAM.of_mode(bound)
    assert (found.side, found.stretched) == (side, stretched)
    assert (0 if found.mosaic is None else found.mosaic.max_tiles) == most_tiles
    with pytest.raises(InfeasibleBudget, match="at least 64 visual tokens, more than the 63 allowed"):
        GUNDAM.of_mode(63)


@pytest.mark.parametrize(("bound", "most_tiles"), [(273, 0), (421, 0), (482, 0), (493, 2)])
def test_a_bound_of_positions_counts_newlines_and_the_separator(bound, most_tiles):
    """It leaves the side, which is that of the row; another one is chosen for all rows."""
    found = GUNDAM.within(bound)
    assert found.side == 1024 and found.most_positions <= bound
    assert (0 if found.mosaic is None else found.mosaic.max_tiles) == most_tiles
    wide = Image.new("RGB", (1300, 650))
    assert GUNDAM.join([found.images([wide])]) is not None
    told = "at least 273 visual tokens, more than the 272 allowed; "
    with pytest.raises(
        InfeasibleBudget, match=told + tried("set token_budget, which chooses among the modes, to {64} tokens")
    ):
        GUNDAM.within(272)
    assert GUNDAM.of_mode(64).most_positions == 73


def test_a_row_has_the_tokens_of_each_image_together():
    views = MosaicViews(Pixels(), 4, 2, mosaic=Mosaic(2, 3, max_tiles=2, threshold=4))
    wide, small = Image.new("RGB", (8, 4)), Image.new("RGB", (4, 4))
    images = views.images([small, wide, wide])
    assert [image.layout.tolist() for image in images] == [[0, 1, -2], *[[2, 3, 4, 5, 6, 7, 0, 1, -2]] * 2]
    assert [image.num_rows for image in images] == [2, 8, 8] and views.loads([(4, 4), (4, 8)]) == [1, 3]
    # Four wholes of two tokens each, then six tiles of three.
    found = views.join([images, images[:1], []], 7, 4)
    assert isinstance(found, WholesAndTiles)
    assert found.wholes.shape == (3, 4, 4, 4, 3) and found.tiles.shape == (3, 6, 2, 2, 3)
    expected = [0, 1, 2, 3, *range(8, 14), 4, 5, *range(14, 20)]
    assert found.order[0, :18].tolist() == expected and found.order[1, :2].tolist() == [0, 1]
    alone = views.join([images[:1]])
    assert isinstance(alone, np.ndarray) and alone.shape == (1, 1, 4, 4, 3)

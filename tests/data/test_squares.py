"""Drawn squares: their pixels, and the boxes of the answers."""

import json

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data.squares import COLOURS, draw_square, square_box, write_squares
from vlm_jax.processors.grounding import answer_boxes


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 1), (2, 3)])
def test_the_box_of_an_answer_is_that_of_the_pixels(row, column):
    picture = np.asarray(draw_square("blue", row, column, seed=3))
    rows, columns = np.nonzero((picture == COLOURS["blue"]).all(-1))
    assert len(rows) == 16 * 16
    (found,) = answer_boxes(square_box(row, column), picture.shape[:2])
    assert found.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_records_ask_for_what_is_drawn(tmp_path):
    records = json.loads(write_squares(tmp_path, 12, seed=1).read_text())
    assert [one["task"] for one in records] == ["colour", "place"] * 6
    for one in records:
        picture = np.asarray(Image.open(tmp_path / one["image"]))
        answer = one["conversations"][1]["value"]
        if one["task"] == "colour":
            assert (picture == COLOURS[answer]).all(-1).sum() == 256
        else:
            (found,) = answer_boxes(answer, (64, 64))
            left, top, right, bottom = map(int, found.box)
            inside = picture[top:bottom, left:right].reshape(-1, 3)
            assert len(inside) == 256 and len(np.unique(inside, axis=0)) == 1


def test_another_seed_draws_others_and_the_same_the_same(tmp_path):
    first, again, other = (
        write_squares(tmp_path / str(number), 8, seed=seed).read_text() for number, seed in enumerate((1, 1, 2))
    )
    assert first == again != other

"""Boxes of answers, with areas by hand."""

import pytest

from vlm_jax.evals.metrics.boxes import Box, Boxes, overlap
from vlm_jax.evals.metrics.metric import Response


def box(*numbers):
    return "<box>({},{}),({},{})</box>".format(*numbers)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (box(0, 0, 100, 100), True),
        (box(0, 0, 100, 50), True),  # half of it: 0.5, which is enough
        (box(0, 0, 100, 49), False),
        (box(50, 0, 150, 100), False),  # 5000 of 15000
        (box(500, 500, 600, 600), False),
        (box(0, 0, 100, 100) + box(0, 0, 100, 100), False),  # one box is asked for
        ("the digit is at " + box(0, 0, 100, 100), True),
        ("", False),
    ],
)
def test_overlap(answer, right):
    assert overlap(answer, box(0, 0, 100, 100)) is right


def test_a_box_of_an_answer_without_an_end_is_wrong():
    references = box(500, 500, 600, 600), box(0, 0, 100, 100)
    assert Box().score(Response(box(0, 0, 100, 100), references)) is True
    assert Box().score(Response(box(0, 0, 100, 100), references, is_finished=False)) is False


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        (box(0, 0, 100, 100) + box(200, 0, 300, 100), box(200, 0, 300, 100) + box(0, 0, 100, 100), 1.0),
        (box(0, 0, 100, 100), box(200, 0, 300, 100) + box(0, 0, 100, 100), 2 / 3),
        (2 * box(0, 0, 100, 100), box(0, 0, 100, 100), 2 / 3),  # a box is in one pair
        (box(0, 0, 100, 49), box(0, 0, 100, 100), 0.0),
        (box(0, 0, 100, 50), box(0, 0, 100, 100), 1.0),  # half of it is enough
        ("nothing", "none", 1.0),
        (box(0, 0, 1, 1), "none", 0.0),
        ("nothing", box(0, 0, 1, 1), 0.0),
    ],
)
def test_the_score_of_several_boxes_is_their_f1(answer, reference, score):
    assert Boxes().score(Response(answer, (reference,))) == pytest.approx(score)
    assert Boxes().score(Response(answer, (box(900, 900, 999, 999), reference))) == pytest.approx(score)

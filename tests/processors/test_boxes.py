"""Boxes as text: exact strings, and overlaps that can be worked out by hand."""

import pytest

from vlm_jax.processors.boxes import format_box, intersection_over_union, parse_boxes, to_pixels


@pytest.mark.parametrize(
    ("box", "height", "width", "text"),
    [
        ((12, 30, 24, 36), 48, 48, "<box>(250,625),(500,750)</box>"),
        ((0, 0, 48, 48), 48, 48, "<box>(0,0),(999,999)</box>"),
        ((1, 1, 2, 2), 3, 7, "<box>(142,333),(285,666)</box>"),
        ((-5, 0, 700, 20), 40, 640, "<box>(0,0),(999,500)</box>"),
    ],
)
def test_a_box_is_floored_to_thousandths_of_each_side(box, height, width, text):
    assert format_box(box, height, width) == text


def test_a_box_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match=r"left <= right and top <= bottom, got \(5, 0, 4, 9\)"):
        format_box((5, 0, 4, 9), 10, 10)


def test_only_well_formed_boxes_are_parsed_in_order():
    text = (
        "a cat <box>(12,30),(450,999)</box> and <box>(1,2),(3,4)</box>"
        "<box>(1,2),(3)</box><box>(1000,2),(1001,4)</box><box>(9,2),(3,4)</box><box>(a,2),(3,4)</box>"
        "<box>(1,2),(3,4)"
    )
    assert parse_boxes(text) == [(12, 30, 450, 999), (1, 2, 3, 4)]
    assert parse_boxes("no box at all") == []


def test_a_formatted_box_comes_back_to_within_a_thousandth():
    height, width = 37, 111
    for box in [(3, 5, 20, 30), (0, 0, 110, 36), (57, 1, 58, 2)]:
        (parsed,) = parse_boxes(format_box(box, height, width))
        returned = to_pixels(parsed, height, width)
        for given, got, size in zip(box, returned, (width, height, width, height), strict=True):
            assert 0 <= given - got < size / 1000


def test_to_pixels_is_a_proportion():
    assert to_pixels((250, 500, 750, 1000), 80, 40) == (10.0, 40.0, 30.0, 80.0)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 4, 4), (0, 0, 4, 4), 1.0),
        ((0, 0, 4, 4), (2, 0, 6, 4), 8 / 24),
        ((0, 0, 4, 4), (1, 1, 3, 3), 4 / 16),
        ((0, 0, 2, 2), (2, 0, 4, 2), 0.0),
        ((0, 0, 2, 2), (5, 5, 6, 6), 0.0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
        ((0, 0, 3, 2), (1, 1, 4, 5), 2 / 16),
    ],
)
def test_intersection_over_union_in_closed_form(a, b, expected):
    assert intersection_over_union(a, b) == pytest.approx(expected, abs=1e-12)
    assert intersection_over_union(b, a) == pytest.approx(expected, abs=1e-12)

"""Boxes and documents as the model cards of Qwen-VL and Qwen2.5-VL show them."""

import numpy as np
import pytest
from PIL import Image

from vlm_jax.processors.grounding import Block, NamedBox, answer_boxes, document_blocks, draw_boxes

JSON = """```json
[
\t{"bbox_2d": [10, 20, 30, 40], "label": "a dog"},
\t{"bbox_2d": [1.5, 2, 3, 4], "label": "a cat", "sub_label": "x"},
\t{"bbox_2d": [1, 2, 3], "label": "three"},
\t{"bbox_2d": [5, 6, 7"""

HTML = """```html
<html><body data-bbox="0 0 100 200">
 <h2 data-bbox="10 20 90 30"> A  title </h2>
 <p data-bbox="10 40 90 60">First<br>second &amp; last</p>
 <table data-bbox="10 70 90 90"><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
 <div class="image" data-bbox="1 2 3 4"><img data-bbox="1 2 3 4"/></div>
 <img data-bbox="5 6 7 8"/>
 <p>without a box</p>
 <p data-bbox="10 95 90 99">cut of
```"""


def test_boxes_on_the_scale_of_1000():
    text = "<ref> the dog</ref><box>(100,200),(300,400)</box> and <box>(0,0),(999,500)</box>"
    found = answer_boxes(text, (50, 200))
    assert found == [NamedBox((20, 10, 60, 20), "the dog"), NamedBox((0, 0, 199.8, 25), None)]


def test_boxes_and_codes_of_tokens_of_places():
    """Top first; as in the demo of PaliGemma's authors, in 1024ths of the image."""
    codes = "".join(f"<seg{number:03}>" for number in range(112, 128))
    text = f"<loc0256><loc0000><loc0512><loc1023> the dog ; <loc0001><loc0002><loc0003><loc0004>{codes} a cat<eos>"
    found = answer_boxes(text, (1024, 2048))
    assert found == [
        NamedBox((0, 256, 2046, 512), "the dog"),
        NamedBox((4, 1, 8, 3), "a cat", tuple(range(112, 128))),
    ]
    three, large = "<loc0001><loc0002><loc0003> x", "<loc0001><loc0002><loc0003><loc1024> x"
    assert answer_boxes(f"{three} ; {large} ; <loc0001><loc0002><loc0003><loc0004><seg001>", (1024, 1024)) == [
        NamedBox((2, 1, 4, 3))
    ]
    assert answer_boxes(text.replace("<seg127>", "<seg128>"), (1024, 2048)) == found[:1]
    drawn = np.asarray(draw_boxes(Image.new("RGB", (2048, 1024)), found[:1]))
    assert (drawn[256, 100] == (255, 0, 0)).all() and (drawn[512, 100] == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (
            "<ref> a cat</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box><box>(5,6)</box>",
            [((1, 2, 3, 4), "a cat"), ((5, 6, 7, 8), None)],
        ),
        (
            "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|><|im_end|>",
            [((1, 2, 3, 4), "the dog")],
        ),
        ("<ref>x</ref> and <ref>y</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8], [9]]</box>",
         [((1, 2, 3, 4), "y"), ((5, 6, 7, 8), "y")]),
        ("<|ref|>a sign<|/ref|><|det|>[[999, 0, 333, 666]]<|/det|>", [((1000, 0, 1000 / 3, 2000 / 3), "a sign")]),
        ("<box>[[1, 2, 3,</box><box>nothing</box>", []),
    ],
)  # fmt: skip
def test_tags_of_every_system(text, boxes):
    found = answer_boxes(text, (1000, 1000))
    assert [box.name for box in found] == [name for _, name in boxes]
    np.testing.assert_allclose([box.box for box in found], [box for box, _ in boxes])


def test_boxes_in_pixels_of_what_the_model_saw():
    assert answer_boxes(JSON, (100, 100)) == [
        NamedBox((10, 20, 30, 40), "a dog"),
        NamedBox((1.5, 2, 3, 4), "a cat"),
    ]
    assert answer_boxes(JSON, (200, 50), (100, 100))[0].box == (5, 40, 15, 80)


@pytest.mark.parametrize("text", ["no box", "<box>(1,2)</box>", '{"bbox_2d": "all"}', "{}"])
def test_an_answer_without_boxes_has_none(text):
    assert answer_boxes(text, (10, 10)) == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "true", "null", "1e400", "9" * 400, "9" * 5000,
                                    "[" * 100_000], ids=lambda number: number[:9])  # fmt: skip
def test_what_is_no_number_makes_no_box(number):
    """The whole boxes next to it stay, and can be drawn."""
    texts = (
        f'[{{"bbox_2d": [0, 0, 2, {number}]}}, {{"bbox_2d": [1, 2, 3, 4]}}]',
        f"<box>[[0, 0, 2, {number}]]</box><box>[[100, 200, 300, 400]]</box>",
        f"<box>(0,0),(2,{number})</box><box>(100,200),(300,400)</box>",
    )
    for text in texts:
        boxes = answer_boxes(text, (10, 10))
        assert [box.box for box in boxes] == [(1, 2, 3, 4)]
        assert np.asarray(draw_boxes(Image.new("RGB", (10, 10)), boxes)).any()
    if number.isdigit():
        html = f'<p data-bbox="0 0 2 {number}">a</p><p data-bbox="1 2 3 4">b</p>'
        assert document_blocks(html, (10, 10)) == [Block("p", "", "b", (1, 2, 3, 4))]


def test_boxes_far_outside_are_drawn_as_far_as_they_are_seen():
    far = answer_boxes('{"bbox_2d": [-1000000000, 4, 1000000000, 1000000000], "label": "x"}', (10_000, 10), (1, 1))
    drawn = np.asarray(draw_boxes(Image.new("RGB", (10, 10)), [*far, NamedBox((2, 3, 5, 8))]))
    assert drawn[3, 2:6].any()


def test_a_document_in_blocks():
    assert document_blocks(HTML, (200, 100)) == [
        Block("h2", "", "A title", (10, 20, 90, 30)),
        Block("p", "", "First\nsecond & last", (10, 40, 90, 60)),
        Block("table", "", "a\tb\n1\t2", (10, 70, 90, 90)),
        Block("div", "image", "", (1, 2, 3, 4)),
        Block("img", "", "", (5, 6, 7, 8)),
        Block("p", "", "cut of", (10, 95, 90, 99)),
    ]
    assert document_blocks(HTML, (400, 100), (200, 100))[0].box == (10, 40, 90, 60)
    assert document_blocks("no document", (1, 1)) == []


@pytest.mark.parametrize("text", ["<a ", '<p data-bbox="1 2 3 4">', "<![x[", "```\n"])
def test_a_malformed_document_is_read_in_linear_time(text):
    """Of 40,000 tags without an end Python's parser took minutes."""
    assert len(document_blocks(text * 40_000, (10, 10))) <= 1


def test_boxes_are_drawn_on_a_copy():
    picture = Image.new("RGB", (60, 40))
    drawn = np.asarray(draw_boxes(picture, [NamedBox((10, 5, 30, 20)), NamedBox((59, 39, 40, 25), "x")]))
    assert not np.asarray(picture).any()
    assert (drawn[5, 10:31] == (255, 0, 0)).all()
    assert (drawn[5:21, 30] == (255, 0, 0)).all()
    assert not drawn[6:20, 11:30].any()
    assert (drawn[25, 40:60] == (0, 255, 0)).all()  # corners in either order; another name, another colour

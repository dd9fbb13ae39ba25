"""Qwen-VL's lists, there and back; the golden folder of its tokenizer has more."""

import random
import re

import pytest

from vlm_jax.processors.list_format import ListFormatError, from_list_format, tagged_parts, to_list_format


def test_a_list_and_its_text():
    items = [{"image": "a.png"}, {"text": "the "}, {"box": [[1, 2, 3, 4]], "ref": "cat"}, {"image": "b.png"}]
    text = "Picture 1: <img>a.png</img>\nthe <ref>cat</ref><box>(1,2),(3,4)</box>Picture 2: <img>b.png</img>\n"
    assert from_list_format(items) == text
    assert to_list_format(text) == [
        {"text": "Picture 1: "},
        {"image": "a.png"},
        {"text": "\nthe "},
        {"ref": "cat"},
        {"box": "(1,2),(3,4)"},
        {"text": "Picture 2: "},
        {"image": "b.png"},
        {"text": "\n"},
    ]


def test_what_is_no_item_and_no_text_of_one_turn():
    with pytest.raises(ListFormatError, match=r"expected an item with the key image, text or box, got {'sound': 1}"):
        from_list_format([{"sound": 1}])
    with pytest.raises(ListFormatError, match=r"without <\|im_end\|>"):
        to_list_format("a<|im_end|>")


@pytest.mark.parametrize("seed", range(100))
def test_parts_between_tags_are_those_of_the_release(seed):
    rng = random.Random(seed)
    parts = ("<box>", "</box>", "<ref>", "</ref>", "<img>", "</img>", "a", "\n", "<box", "</quad>", "<quad>")
    text = "".join(rng.choices(parts, k=rng.randint(1, 14)))
    expected = [
        (found[1], found[2], *found.span()) for found in re.finditer(r"<(img|ref|box|quad)>(.*?)</\1>", text, re.DOTALL)
    ]
    found = tagged_parts(text, ("img", "ref", "box", "quad"))
    assert [(part.name, part.content, part.start, part.end) for part in found] == expected


@pytest.mark.parametrize("text", ["<box>", "<box><ref>", "</box><box>", "<box></ref>"])
def test_tags_without_an_end_take_linear_time(text):
    """Of 100,000 the quadratic search took minutes."""
    assert to_list_format(text * 100_000) == [{"text": text * 100_000}] or "/box" in text

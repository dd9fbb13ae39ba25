"""Qwen-VL's lists, there and back; the golden folder of its tokenizer has more."""

import pytest

from vlm_jax.processors.list_format import ListFormatError, from_list_format, to_list_format


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

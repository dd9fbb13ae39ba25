"""The tokenizer of the digit pages, and tokenizer files: ids, round trips and what is refused."""

import re

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from vlm_jax.processors.digits_vocabulary import digits_tokenizer
from vlm_jax.processors.layout_tokenizer import LayoutTokenizer, UnknownText

# Counted by hand: 5 special tokens, 6 task words, 10 digits, 5 marks of a box.
VOCABULARY_SIZE = 26


def test_the_vocabulary_is_specials_words_digits_and_marks():
    tokenizer = digits_tokenizer()
    assert tokenizer.vocab_size == VOCABULARY_SIZE
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id) == (0, 1, 2, 3)
    assert tokenizer.encode("read transcribe count locate row column") == [5, 6, 7, 8, 9, 10]
    assert tokenizer.encode("0123456789") == list(range(11, 21))
    assert tokenizer.encode("<box></box>(),") == [21, 22, 23, 24, 25]


@pytest.mark.parametrize(
    "text",
    [
        "<box>(12,30),(450,999)</box>",
        "<box>(0,0),(999,999)</box>",
        "7419",
        "0",
        "12",
        "read row 2 column 3",
        "read row 12 column 10",
        "transcribe row 2",
        "count 7",
        "locate 0",
    ],
)
def test_canonical_texts_come_back_exactly(text):
    tokenizer = digits_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_digit_is_one_token_and_spaces_between_them_are_dropped():
    tokenizer = digits_tokenizer()
    assert tokenizer.encode("7 4 1 9") == tokenizer.encode("7419") == [18, 15, 12, 20]
    assert len(tokenizer.encode("<box>(12,30),(450,999)</box>")) == 19


def test_special_tokens_are_left_out_of_decoded_text():
    tokenizer = digits_tokenizer()
    ids = [tokenizer.bos_id, *tokenizer.encode("count 7"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "count 7"


def test_the_ids_of_a_text_are_the_callers_own():
    tokenizer = digits_tokenizer()
    tokenizer.encode("count 7").append(99)
    assert tokenizer.encode("count 7") == [7, 18]


@pytest.mark.parametrize(
    ("text", "word"),
    [("read the row 2", "the"), ("count 7!", "!"), ("<bx>(1,2)", "<bx>"), ("count 7é", "é")],
)
def test_an_unknown_word_is_named_with_its_text(text, word):
    with pytest.raises(UnknownText, match=re.escape(f"has no '{word}', in the text '{text}'")):
        digits_tokenizer().encode(text)


def test_a_text_may_not_contain_a_special_token():
    with pytest.raises(UnknownText, match="special token <image> may not stand in a text, here 'count <image>'"):
        digits_tokenizer().encode("count <image>")


def test_a_tokenizer_file_is_read_with_its_own_names(tmp_path):
    vocabulary = {"[PAD]": 0, "[S]": 1, "[E]": 2, "[I]": 3, "[U]": 4, "a": 5, "cat": 6}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[PAD]", "[S]", "[E]", "[I]", "[U]"])
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    tokenizer = LayoutTokenizer.from_file(path, pad="[PAD]", bos="[S]", eos="[E]", image="[I]")
    assert tokenizer.encode("a cat") == [5, 6]
    assert tokenizer.decode([1, 5, 6, 2]) == "a cat"
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id) == (0, 1, 2, 3)
    with pytest.raises(UnknownText, match="has no 'dog', in the text 'a dog'"):
        tokenizer.encode("a dog")
    with pytest.raises(ValueError, match=r"tokenizer\.json: bos_token '<s>', eos_token '<eos>' not in its"):
        LayoutTokenizer.from_file(path, pad="[PAD]", bos="<s>", image="[I]")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json of the tokenizers library"):
        LayoutTokenizer.from_file(path)

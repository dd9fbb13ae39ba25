"""Names of numbers, as the package num2words (0.5.14) writes them."""

import pytest

from vlm_jax.processors.number_words import in_words

WORDS = {
    0: "zero",
    1: "one",
    13: "thirteen",
    20: "twenty",
    21: "twenty-one",
    64: "sixty-four",
    100: "one hundred",
    101: "one hundred and one",
    768: "seven hundred and sixty-eight",
    1000: "one thousand",
    1001: "one thousand and one",
    1234: "one thousand, two hundred and thirty-four",
    20_500: "twenty thousand, five hundred",
}


@pytest.mark.parametrize("number", WORDS)
def test_words(number):
    assert in_words(number) == WORDS[number]


@pytest.mark.parametrize("number", [-1, 10**6])
def test_numbers_without_words(number):
    with pytest.raises(ValueError, match=f"from 0 to 999999, got {number}"):
        in_words(number)

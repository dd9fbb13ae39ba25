"""Images and texts of two towers and classifiers; `tests/parity/test_image_text.py` compares whole folders."""

import dataclasses
import inspect
import pathlib

import numpy as np
import pytest
import tokenizers
from PIL import Image
from tokenizers import models, pre_tokenizers

from vlm_jax.interpolation import interpolation_weights
from vlm_jax.processors.image_text import ImageTextProcessor, SquareInputs, TensorFlowInputs, TextInputs
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.processors.vocabulary import TokenizersVocabulary

from ..advice import tried

WORDS = {"<pad>": 0, "<end>": 1, "<unk>": 2, "a": 3, "b": 4}


@pytest.fixture(scope="module")
def tokenizer():
    backend = tokenizers.Tokenizer(models.WordLevel(WORDS, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", 1)])
    return Tokenizer(TokenizersVocabulary(backend), {"eos_token": "<end>", "pad_token": "<pad>"})


def test_texts_are_filled_up_or_cut_before_their_end(tokenizer):
    found = TextInputs(tokenizer, 4, 0)(["a", "a b a", "b b b b b b", ""])
    np.testing.assert_array_equal(found, [[3, 1, 0, 0], [3, 4, 3, 1], [4, 4, 4, 1], [1, 0, 0, 0]])


def test_cleaning(tokenizer):
    bare = TextInputs(tokenizer, 1, 0, lower=True, bare=True)
    assert bare.cleaned(" A, (b)\n\tC_d! ") == "a b cd"
    assert TextInputs(tokenizer, 1, 0, lower=True).cleaned("A, B!") == "a, b!"
    assert TextInputs(tokenizer, 1, 0).cleaned("A, B!") == "A, B!"


def test_the_middle_of_torchvision_rounds_halves_to_even():
    draw = np.random.default_rng(0)
    for spare, left in ((1, 0), (3, 2), (5, 2), (7, 4)):
        image = draw.integers(0, 256, (8, 8 + spare, 3), np.uint8)
        views = SquareViews(Pixels(), (8, 8), fit="crop_rounded")
        found = SquareInputs(views)([Image.fromarray(image)])[0]
        np.testing.assert_allclose(found * 255, image[:, left : left + 8], atol=1e-4)


@pytest.mark.parametrize(("given", "wanted"), [(6, 4), (7, 3), (4, 8), (9, 9)])
def test_areas_cover_samples_by_their_overlap(given, wanted):
    """Compared with samples repeated until windows are whole."""
    values = np.random.default_rng(0).normal(size=given).astype(np.float32)
    expected = np.repeat(values, wanted).reshape(wanted, given).mean(axis=1)
    np.testing.assert_allclose(interpolation_weights(given, wanted, "overlap") @ values, expected, atol=1e-6)


def test_the_middle_of_a_picture_shrunk_by_areas():
    """Blocks of whole pixels are averaged and lose their fractions; then the middle is cut out."""
    image = np.random.default_rng(0).integers(0, 256, (24, 42, 3), np.uint8)
    found = TensorFlowInputs((4, 4), "overlap", shortest_edge=8)([Image.fromarray(image)])[0]
    means = np.floor(image.reshape(8, 3, 14, 3, 3).astype(float).mean(axis=(1, 3)) + 1e-4)
    np.testing.assert_allclose((found + 1) * 127.5, means[2:6, 5:9], atol=1e-4)


def test_what_is_not_read_is_refused(tokenizer):
    picture, texts = Image.new("RGB", (8, 8)), TextInputs(tokenizer, 4, 0)
    images = SquareInputs(SquareViews(Pixels(), (8, 8)))
    with pytest.raises(PictureMismatch, match="takes no images, got 1"):
        ImageTextProcessor(None, texts)([picture])
    with pytest.raises(PictureMismatch, match="takes no texts"):
        ImageTextProcessor(images)([picture], ["a"])
    with pytest.raises(
        PictureMismatch, match=tried("expected images or texts, got none; pass images=[…], texts=[…] or both")
    ):
        ImageTextProcessor(images, texts)()
    assert ImageTextProcessor(images, texts)([picture]).images.shape == (1, 8, 8, 3)
    assert ImageTextProcessor(images, texts)(texts=["a"]).tokens.shape == (1, 4)
    assert len(ImageTextProcessor(images, texts)([picture], ["a"]).inputs) == 2
    unchecked = inspect.unwrap(ImageTextProcessor.__call__)  # without the checks of types in tests
    for wrong, told in (
        ("a", r"texts: expected a list, got 'a'; write \['a'\]"),
        (5, "texts: expected a list, got one int"),
        (["a", 3], r"texts\[1\]: expected a text, got 3"),
        ([None], r"texts\[0\]: expected a text, got None"),
    ):
        with pytest.raises(PictureMismatch, match=told):
            unchecked(ImageTextProcessor(images, dataclasses.replace(texts, lower=True)), texts=wrong)
    with pytest.raises(ValueError, match="image 1: its header claims 8x9 pixels, more than max_pixels=64"):
        ImageTextProcessor(images, max_pixels=64)([picture, Image.new("RGB", (9, 8))])


PIXELS = np.zeros((2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    "one",
    [Image.fromarray(PIXELS[0]), PIXELS[0], PIXELS, "a.png", pathlib.Path("a.png"), b"\x89PNG"],
    ids=lambda one: type(one).__name__,
)
def test_one_picture_is_no_list(one):
    processor = ImageTextProcessor(SquareInputs(SquareViews(Pixels(), (8, 8))))
    # Without the checks of types, which are before it in tests.
    call = inspect.unwrap(type(processor).__call__)
    with pytest.raises(PictureMismatch, match=r"images: expected a list, got .*; write \["):
        call(processor, one)

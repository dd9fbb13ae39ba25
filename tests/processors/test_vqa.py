"""Samples to rows: whole rows written by hand, and samples that do not fit."""

import dataclasses

import numpy as np
import pytest

from vlm_jax.processors.digits_vocabulary import digits_tokenizer
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.processors.layout_tokenizer import UnknownText
from vlm_jax.processors.sample_views import Pixels, TiledViews
from vlm_jax.processors.vqa import VqaProcessor
from vlm_jax.types import Sample, Turn

PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
COUNT, READ, ROW, COLUMN = 7, 5, 9, 10


def digit(value: int) -> int:
    return 11 + value


PROCESSOR = VqaProcessor(
    tokenizer=digits_tokenizer(),
    views=TiledViews(Pixels(1, (0.5,), (0.25,), "bilinear"), (4, 6), num_tokens=2),
    num_visual_tokens=2,
    num_images=1,
    max_length=16,
    max_prompt_length=8,
    max_answer_length=3,
)
PICTURE = np.full((4, 6, 1), 255, np.uint8)
SAMPLE = Sample("page", (PICTURE,), (Turn("count 7", "12", "count"), Turn("read row 1 column 2", "3", "read")))


def test_a_training_row_holds_every_turn():
    row = PROCESSOR(SAMPLE)
    real = [BOS, IMAGE, IMAGE, COUNT, digit(7), digit(1), digit(2), EOS]
    real += [READ, ROW, digit(1), COLUMN, digit(2), digit(3), EOS]
    assert row.tokens.tolist() == [[*real, PAD]]
    assert row.visual_index.tolist() == [[-1, 0, 1] + [-1] * 13]
    assert row.positions.tolist() == [[*range(15), 0]]
    learned = [token for token, weight in zip(row.targets[0], row.loss_weights[0], strict=True) if weight == 1.0]
    assert learned == [digit(1), digit(2), EOS, digit(3), EOS]
    # The target of a position is the token that stands one further on.
    np.testing.assert_array_equal(row.targets[:, :14], row.tokens[:, 1:15])
    np.testing.assert_allclose(row.images, np.full((1, 1, 4, 6, 1), (1.0 - 0.5) / 0.25))
    assert row.images.dtype == np.float32


def test_a_prompt_ends_with_the_first_question():
    row = PROCESSOR.prompt(SAMPLE)
    assert row.tokens.tolist() == [[PAD, PAD, PAD, BOS, IMAGE, IMAGE, COUNT, digit(7)]]
    assert row.positions.tolist() == [[0, 0, 0, 0, 1, 2, 3, 4]]
    assert row.segment_ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]
    assert row.visual_index.tolist() == [[-1, -1, -1, -1, 0, 1, -1, -1]]
    assert row.targets is None
    assert row.loss_weights is None
    assert row.images.shape == (1, 1, 4, 6, 1)


def test_two_images_fill_consecutive_rows_of_the_table():
    views = TiledViews(Pixels(3, (0.0,) * 3, (1.0,) * 3, "bilinear"), (4, 6), num_tokens=2)
    processor = dataclasses.replace(PROCESSOR, num_images=2, views=views)
    big = np.zeros((9, 9, 3), np.uint8)
    row = processor(Sample("pair", (PICTURE, big), (Turn("count 7", "1"),)))
    assert row.visual_index[0, :6].tolist() == [-1, 0, 1, 2, 3, -1]
    assert row.images.shape == (1, 2, 4, 6, 3)
    assert row.images[0, 0].min() == 1.0
    assert row.images[0, 1].max() == 0.0


def test_context_stands_where_the_images_would():
    row = dataclasses.replace(PROCESSOR, num_images=0)(Sample("text", (), (Turn("count 7", "1"),), context="749"))
    real = [BOS, digit(7), digit(4), digit(9), COUNT, digit(7), digit(1), EOS]
    assert row.tokens[0, :8].tolist() == real
    assert row.visual_index.max() == -1
    assert row.loss_weights[0].tolist() == [0.0] * 5 + [1.0, 1.0] + [0.0] * 9
    assert row.images is None


@pytest.mark.parametrize(
    ("sample", "error", "message"),
    [
        (dataclasses.replace(SAMPLE, images=()), ValueError, "'page' has 0 images; .* must have 1"),
        (
            dataclasses.replace(SAMPLE, images=(PICTURE,) * 2),
            ValueError,
            "'page' has 2 images; .* must have 1",
        ),
        (dataclasses.replace(SAMPLE, turns=()), ValueError, "'page' has no question"),
        (dataclasses.replace(SAMPLE, turns=(Turn("who", "1"),)), UnknownText, "'page': .* no 'who'"),
        (
            dataclasses.replace(SAMPLE, turns=SAMPLE.turns * 2),
            SequenceTooLong,
            "'page' is 27 .* config.processor.max_text_length",
        ),
    ],
)
def test_a_sample_that_does_not_fit_is_named(sample, error, message):
    with pytest.raises(error, match=message):
        PROCESSOR(sample)


def test_a_prompt_or_reference_answer_over_its_limit_is_named():
    long_question = Sample("page", (PICTURE,), (Turn("read row 12 column 1", "1"),))
    with pytest.raises(SequenceTooLong, match=r"'page' is 9 tokens .* config\.processor\.max_question_length"):
        PROCESSOR.prompt(long_question)
    with pytest.raises(SequenceTooLong, match=r"'page': .* 4 tokens .* raise config\.processor\.max_answer_length"):
        PROCESSOR.prompt(Sample("page", (PICTURE,), (Turn("count 7", "123"),)))


def test_independent_turns_follow_the_images_and_read_nothing_of_each_other():
    processor = dataclasses.replace(PROCESSOR, independent_turns=True)
    row, together = processor(SAMPLE), PROCESSOR(SAMPLE)
    for field in ("tokens", "targets", "loss_weights", "segment_ids", "visual_index"):
        np.testing.assert_array_equal(getattr(row, field), getattr(together, field))
    assert together.branch_ids is None
    opening = 1 + processor.num_images * processor.num_visual_tokens
    first, second = 2 + 3, 5 + 2  # question, answer and <eos>
    branches = [0] * opening + [1] * first + [2] * second
    positions = [*range(opening), *range(opening, opening + first), *range(opening, opening + second)]
    padding = [0] * (processor.max_length - len(branches))
    np.testing.assert_array_equal(row.branch_ids, [branches + padding])
    np.testing.assert_array_equal(row.positions, [positions + padding])

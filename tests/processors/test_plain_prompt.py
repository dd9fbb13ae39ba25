"""Conversations without a chat template: whole rows written by hand, and samples that do not fit."""

import dataclasses
import re

import numpy as np
import pytest

from vlm_jax.processors.digits_vocabulary import digits_tokenizer
from vlm_jax.processors.layout import SequenceTooLong, Text
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.plain_prompt import PlainPrompt, UnknownText
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import Slot
from vlm_jax.processors.spelled_prompt import PromptError
from vlm_jax.processors.tiles import FixedTilesViews
from vlm_jax.processors.tokenizer import Tokenizer, TokenizerError
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.types import RowShape, Turn, dialogue

from ..advice import tried

PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
COUNT, READ, ROW, COLUMN = 7, 5, 9, 10
NUM_TOKENS = 2


def digit(value: int) -> int:
    return 11 + value


TOKENIZER = digits_tokenizer()
PROCESSOR = Processor(
    PlainPrompt(TOKENIZER), FixedTilesViews(Pixels((0.5,), (0.25,)), (4, 6), NUM_TOKENS), TOKENIZER, pad_id=PAD
)
PICTURE = np.full((4, 6, 1), 255, np.uint8)
SHAPE = RowShape(16, 1)
TURNS = (Turn("count 7", "12", "count"), Turn("read row 1 column 2", "3", "read"))


def training_row(messages, images=(PICTURE,), *, processor=PROCESSOR, shape=SHAPE):
    example = processor.example(messages, images, targets=True, name="page")
    return processor.rows([[example]], shape, targets=True)


def test_a_training_row_holds_every_turn():
    row = training_row(dialogue(TURNS, num_images=1))
    real = [BOS, IMAGE, IMAGE, COUNT, digit(7), digit(1), digit(2), EOS]
    real += [READ, ROW, digit(1), COLUMN, digit(2), digit(3), EOS]
    assert row.tokens.tolist() == [[*real, PAD]]
    assert row.visual_index.tolist() == [[-1, 0, 1] + [-1] * 13]
    assert row.positions.tolist() == [[*range(15), 0]]
    learned = [token for token, weight in zip(row.targets[0], row.loss_weights[0], strict=True) if weight == 1.0]
    assert learned == [digit(1), digit(2), EOS, digit(3), EOS]
    # The target of a position is the token that is one further on.
    np.testing.assert_array_equal(row.targets[:, :14], row.tokens[:, 1:15])
    np.testing.assert_allclose(row.images, np.full((1, 1, 4, 6, 1), (1.0 - 0.5) / 0.25))
    assert row.images.dtype == np.float32


def test_a_prompt_ends_with_the_last_question():
    example = PROCESSOR.example(dialogue(TURNS[:1], num_images=1)[:-1], [PICTURE])
    row = PROCESSOR.rows([[example]], RowShape(8, 1), targets=False)
    assert row.tokens.tolist() == [[PAD, PAD, PAD, BOS, IMAGE, IMAGE, COUNT, digit(7)]]
    assert row.positions.tolist() == [[0, 0, 0, 0, 1, 2, 3, 4]]
    assert row.segment_ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]
    assert row.visual_index.tolist() == [[-1, -1, -1, -1, 0, 1, -1, -1]]
    assert row.targets is None
    assert row.loss_weights is None
    assert row.images.shape == (1, 1, 4, 6, 1)


def test_two_images_fill_consecutive_rows_of_the_table():
    processor = dataclasses.replace(PROCESSOR, views=FixedTilesViews(Pixels(), (4, 6), NUM_TOKENS))
    big = np.zeros((9, 9, 3), np.uint8)
    messages = dialogue([Turn("count 7", "1")], num_images=2)
    row = training_row(messages, (PICTURE, big), processor=processor, shape=RowShape(16, 2))
    assert row.visual_index[0, :6].tolist() == [-1, 0, 1, 2, 3, -1]
    assert row.images.shape == (1, 2, 4, 6, 3)
    assert row.images[0, 0].min() == 1.0
    assert row.images[0, 1].max() == 0.0


def test_context_stands_where_the_images_would():
    row = training_row(dialogue([Turn("count 7", "1")], context="749"), (), shape=RowShape(16, 0))
    real = [BOS, digit(7), digit(4), digit(9), COUNT, digit(7), digit(1), EOS]
    assert row.tokens[0, :8].tolist() == real
    assert row.visual_index.max() == -1
    assert row.loss_weights[0].tolist() == [0.0] * 5 + [1.0, 1.0] + [0.0] * 9
    assert row.images is None


@pytest.mark.parametrize(
    ("messages", "images", "error", "message"),
    [
        (dialogue(TURNS, num_images=1), (), PictureMismatch, "page: its text has 1 image placeholders, but got 0"),
        (
            dialogue(TURNS, num_images=1),
            (PICTURE,) * 2,
            PictureMismatch,
            "page: its text has 1 image placeholders, but got 2",
        ),
        (dialogue(TURNS, num_images=1)[1:2], (), PromptError, "page: expected at least one user message"),
        (dialogue(TURNS, num_images=1)[:1], (PICTURE,), PromptError, "page: expected at least one assistant message"),
        (dialogue([Turn("who", "1")]), (), UnknownText, "page: .* no 'who'"),
        (
            dialogue(TURNS * 2, num_images=1),
            (PICTURE,),
            SequenceTooLong,
            r"'page' is 27 tokens long, over the limit of 16; raise config\.row\.length by 11 or more",
        ),
        (
            dialogue([Turn("count 7", "1")], num_images=2),
            (PICTURE,) * 2,
            SequenceTooLong,
            r"'page' has 2 tiles .* the limit of 1; raise config\.row\.images by 1 or more",
        ),
    ],
)
def test_a_sample_that_does_not_fit_is_named(messages, images, error, message):
    with pytest.raises(error, match=message):
        training_row(messages, images)


def test_variables_of_templates_are_refused():
    with pytest.raises(
        PromptError, match=tried("without a chat template, {enable_thinking} are unused; leave them out")
    ):
        PROCESSOR.example(dialogue(TURNS), enable_thinking=True)
    assert PROCESSOR.example(dialogue(TURNS)).load.length > 0


def test_independent_turns_follow_the_images_and_read_nothing_of_each_other():
    processor = dataclasses.replace(PROCESSOR, prompt=PlainPrompt(TOKENIZER, independent_turns=True))
    messages = dialogue(TURNS, num_images=1)
    row, together = training_row(messages, processor=processor), training_row(messages)
    for field in ("tokens", "targets", "loss_weights", "segment_ids", "visual_index"):
        np.testing.assert_array_equal(getattr(row, field), getattr(together, field))
    assert together.branch_ids is None
    opening = 1 + NUM_TOKENS
    first, second = 2 + 3, 5 + 2  # question, answer and <eos>
    branches = [0] * opening + [1] * first + [2] * second
    positions = [*range(opening), *range(opening, opening + first), *range(opening, opening + second)]
    np.testing.assert_array_equal(row.branch_ids, [[*branches, 0]])
    np.testing.assert_array_equal(row.positions, [[*positions, 0]])


def test_a_prompt_of_independent_turns_is_one_branch():
    """Generation takes no branches; of one question the row is the same."""
    processor = dataclasses.replace(PROCESSOR, prompt=PlainPrompt(TOKENIZER, independent_turns=True))
    asked = dialogue(TURNS[:1], num_images=1)[:-1]
    row, expected = (made(asked, [PICTURE]) for made in (processor, PROCESSOR))
    assert row.branch_ids is None
    np.testing.assert_array_equal(row.tokens, expected.tokens)
    np.testing.assert_array_equal(row.positions, expected.positions)


def test_pictures_stand_where_the_messages_have_them_and_a_video_has_its_places():
    def said(text):
        return {"type": "text", "text": text}

    messages = [
        {"role": "system", "content": "read"},
        {"role": "user", "content": [{"type": "image"}, said("count 7")]},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": [said("row"), {"type": "video"}, said("2")]},
    ]
    pieces = PlainPrompt(TOKENIZER)(messages, [(0.0, 0.5, 1.0)])
    shown = [piece.kind if isinstance(piece, Slot) else [*piece.ids] for piece in pieces]
    words = [[BOS], [READ], "image", [COUNT, digit(7)], [digit(1), EOS], [ROW], *["video"] * 3, [digit(2)]]
    assert shown == words
    assert not any(piece.learned for piece in pieces if isinstance(piece, Text))


def test_a_question_may_stand_before_its_picture():
    """With independent turns the question is of its turn's branch, and what is before it is shared."""
    question = {"role": "user", "content": [{"type": "text", "text": text} for text in ("749", "count 7")]}
    question["content"].append({"type": "image"})
    first, context, asked, picture = PlainPrompt(TOKENIZER, independent_turns=True)([question], (), targets=True)
    assert (first.branch, context.branch, asked.branch) == (0, 0, 1)
    assert [*asked.ids] == [COUNT, digit(7)] and isinstance(picture, Slot)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("read the row 2", "has no 'the', in the text 'read the row 2'"),
        ("count 7!", "has no '!', in the text 'count 7!'"),
        ("<bx>(1,2)", "has no '<bx>', in the text '<bx>(1,2)'"),
        ("count 7é", "has no 'é', in the text 'count 7é'"),
        ("count <image>", "special token <image> is not allowed in a text, got 'count <image>'"),
    ],
)
def test_an_unknown_word_or_a_special_token_is_named_with_its_text(text, told):
    with pytest.raises(UnknownText, match=re.escape(told)):
        PlainPrompt(TOKENIZER)([{"role": "user", "content": text}], ())


def test_a_tokenizer_without_an_image_token_is_refused():
    bare = Tokenizer(TOKENIZER.vocabulary, {"bos_token": "<bos>", "eos_token": "<eos>"})
    with pytest.raises(TokenizerError, match="has no token 'image'"):
        PlainPrompt(bare)([{"role": "user", "content": "count 7"}], ())

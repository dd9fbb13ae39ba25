"""The layout's arrays against arrays written by hand."""

import numpy as np
import pytest

from vlm_jax.processors.layout import SequenceTooLong, Text, Visual, lay_out

PAD, IMAGE = 0, 9
PIECES = [Text([1]), Visual([0, 1]), Visual([5]), Text([11, 12]), Text([21, 22, 2], learned=True)]
# position            0   1  2  3   4   5   6   7  8


def check(batch, **expected):
    for field, values in expected.items():
        np.testing.assert_array_equal(getattr(batch, field), [values], err_msg=field)


def test_a_training_row_padded_on_the_right():
    row = lay_out(PIECES, 11, pad_id=PAD, image_id=IMAGE, sample_id="s")
    check(
        row,
        tokens=[1, IMAGE, IMAGE, IMAGE, 11, 12, 21, 22, 2, PAD, PAD],
        positions=[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0],
        segment_ids=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
        visual_index=[-1, 0, 1, 5, -1, -1, -1, -1, -1, -1, -1],
        targets=[IMAGE, IMAGE, IMAGE, 11, 12, 21, 22, 2, PAD, PAD, PAD],
        loss_weights=[0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0],
    )
    assert row.images is None
    assert {row.tokens.dtype, row.positions.dtype, row.segment_ids.dtype, row.visual_index.dtype} == {
        np.dtype(np.int32)
    }
    assert row.loss_weights.dtype == np.float32


def test_a_prompt_padded_on_the_left():
    row = lay_out(PIECES[:4], 8, pad_id=PAD, image_id=IMAGE, sample_id="s", pad_side="left")
    check(
        row,
        tokens=[PAD, PAD, 1, IMAGE, IMAGE, IMAGE, 11, 12],
        positions=[0, 0, 0, 1, 2, 3, 4, 5],
        segment_ids=[0, 0, 1, 1, 1, 1, 1, 1],
        visual_index=[-1, -1, -1, 0, 1, 5, -1, -1],
        targets=[PAD, PAD, IMAGE, IMAGE, IMAGE, 11, 12, PAD],
        loss_weights=[0] * 8,
    )


def test_three_axes_go_on_after_the_largest_position_of_a_picture():
    grid = [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]  # two rows of three
    pieces = [Text([1, 4]), Visual(range(6), positions=np.array(grid)), Text([5]), Visual([7], ids=[8]), Text([6])]
    row = lay_out(pieces, 12, pad_id=PAD, image_id=IMAGE, sample_id="s", pad_side="left", rotary_3d=True)
    picture = [[2 + step for step in place] for place in grid]
    check(
        row,
        positions=[[0] * 3, [0] * 3, [1] * 3, *picture, [5] * 3, [6] * 3, [7] * 3],
        tokens=[PAD, 1, 4, *[IMAGE] * 6, 5, 8, 6],
        visual_index=[-1, -1, -1, 0, 1, 2, 3, 4, 5, -1, 7, -1],
    )


def test_two_turns_learn_both_answers_and_no_question():
    turns = [Text([1]), Text([5]), Text([6, 2], learned=True), Text([7]), Text([8, 2], learned=True)]
    row = lay_out(turns, 7, pad_id=PAD, image_id=IMAGE, sample_id="s")
    check(row, targets=[5, 6, 2, 7, 8, 2, PAD], loss_weights=[0, 1, 1, 0, 1, 1, 0])


def test_a_sequence_that_fills_the_row_fits():
    row = lay_out(PIECES, 9, pad_id=PAD, image_id=IMAGE, sample_id="s")
    check(row, segment_ids=[1] * 9)


def test_a_longer_sequence_is_an_error_and_never_cut():
    with pytest.raises(
        SequenceTooLong,
        match=r"sample 'page 3' is 9 tokens long, .* 8; raise config\.processor\.max_text_length by 1 or",
    ):
        lay_out(PIECES, 8, pad_id=PAD, image_id=IMAGE, sample_id="page 3")
    with pytest.raises(SequenceTooLong, match=r"raise config\.processor\.max_question_length by 1 or"):
        lay_out(
            PIECES,
            8,
            pad_id=PAD,
            image_id=IMAGE,
            sample_id="page 3",
            limit_key="config.processor.max_question_length",
        )

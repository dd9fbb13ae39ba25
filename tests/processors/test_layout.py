"""The layout's arrays against arrays written by hand."""

import numpy as np
import pytest

from vlm_jax.processors.layout import Text, Visual, lay_out

PAD, IMAGE = 0, 9
PIECES = [
    Text([1]),
    Visual([0, 1], [IMAGE] * 2),
    Visual([5], [IMAGE]),
    Text([11, 12]),
    Text([21, 22, 2], learned=True),
]
# position            0   1  2  3   4   5   6   7  8


def check(batch, **expected):
    for field, values in expected.items():
        np.testing.assert_array_equal(getattr(batch, field), [values], err_msg=field)


def test_a_training_row_padded_on_the_right():
    row = lay_out([PIECES], 11, pad_id=PAD)
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
    row = lay_out([PIECES[:4]], 8, pad_id=PAD, pad_side="left")
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
    pieces = [Text([1, 4]), Visual(range(6), [IMAGE] * 6, np.array(grid)), Text([5]), Visual([7], [8]), Text([6])]
    row = lay_out([pieces], 12, pad_id=PAD, pad_side="left", rotary_3d=True)
    picture = [[2 + step for step in place] for place in grid]
    check(
        row,
        positions=[[0] * 3, [0] * 3, [1] * 3, *picture, [5] * 3, [6] * 3, [7] * 3],
        tokens=[PAD, 1, 4, *[IMAGE] * 6, 5, 8, 6],
        visual_index=[-1, -1, -1, 0, 1, 2, 3, 4, 5, -1, 7, -1],
    )


def test_two_turns_learn_both_answers_and_no_question():
    turns = [Text([1]), Text([5]), Text([6, 2], learned=True), Text([7]), Text([8, 2], learned=True)]
    row = lay_out([turns], 7, pad_id=PAD)
    check(row, targets=[5, 6, 2, 7, 8, 2, PAD], loss_weights=[0, 1, 1, 0, 1, 1, 0])


def test_a_sequence_that_fills_the_row_fits():
    row = lay_out([PIECES], 9, pad_id=PAD)
    check(row, segment_ids=[1] * 9)


def test_a_longer_sequence_is_an_error_and_never_cut():
    with pytest.raises(ValueError, match="9 positions do not fit in a row of 8"):
        lay_out([PIECES], 8, pad_id=PAD)


def test_two_examples_share_a_row():
    """Positions begin again, segments differ, and no place is to say the first token of the other example."""
    second = [Text([3, 4]), Visual([6], [IMAGE]), Text([31], learned=True), Text([32], learned=True)]
    row = lay_out([PIECES, second], 16, pad_id=PAD)
    check(
        row,
        tokens=[1, IMAGE, IMAGE, IMAGE, 11, 12, 21, 22, 2, 3, 4, IMAGE, 31, 32, PAD, PAD],
        positions=[*range(9), *range(5), 0, 0],
        segment_ids=[1] * 9 + [2] * 5 + [0, 0],
        visual_index=[-1, 0, 1, 5, -1, -1, -1, -1, -1, -1, -1, 6, -1, -1, -1, -1],
        targets=[IMAGE, IMAGE, IMAGE, 11, 12, 21, 22, 2, PAD, 4, IMAGE, 31, 32, PAD, PAD, PAD],
        loss_weights=[0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0],
    )
    assert row.branch_ids is None


def test_learned_text_that_begins_an_example_is_no_target_of_the_one_before():
    row = lay_out([[Text([5, 6])], [Text([7, 8], learned=True)]], 4, pad_id=PAD)
    check(row, targets=[6, PAD, 8, PAD], loss_weights=[0, 0, 1, 0])


def test_three_axes_begin_again_with_each_example():
    square = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])
    example = [Text([1]), Visual(range(4), [IMAGE] * 4, square), Text([2])]
    row = lay_out([example, example], 13, pad_id=PAD, rotary_3d=True)
    own = [[0] * 3, *(square + 1).tolist(), [3] * 3]
    check(row, positions=[*own, *own, [0] * 3], segment_ids=[1] * 6 + [2] * 6 + [0])


def test_branches_follow_the_shared_pieces_on_three_axes():
    """Each begins where the shared text and images end, whatever is before it in the row."""
    line = np.array([[0, 0, 0], [0, 0, 1], [0, 0, 2]])
    pieces = [
        Text([1]),
        Visual(range(3), [IMAGE] * 3, line),  # positions 1, and 4 follows
        Text([2, 3], branch=1),
        Text([4], branch=1, learned=True),
        Text([5], branch=2),
        Text([6, 7], branch=2, learned=True),
    ]
    row = lay_out([pieces], 11, pad_id=PAD, rotary_3d=True)
    check(
        row,
        branch_ids=[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0],
        positions=[[0] * 3, *(line + 1).tolist(), *([p] * 3 for p in (4, 5, 6, 4, 5, 6)), [0] * 3],
        loss_weights=[0, 0, 0, 0, 0, 1, 0, 1, 1, 0, 0],
    )


def test_examples_with_and_without_branches_share_a_row():
    row = lay_out([[Text([1]), Text([2], branch=1), Text([3], branch=2)], [Text([4, 5])]], 5, pad_id=PAD)
    check(row, branch_ids=[0, 1, 2, 0, 0], positions=[0, 1, 1, 0, 1], segment_ids=[1, 1, 1, 2, 2])


def test_every_piece_has_its_group():
    one, two = (Visual(range(n), [IMAGE] * n, group=n) for n in (2, 3))
    row = lay_out([[Text([1]), one, two], [one, Text([2], group=2), Text([3])]], 11, pad_id=PAD, pad_side="left")
    check(row, group_ids=[0, 0, 2, 2, 3, 3, 3, 2, 2, 2, 0], segment_ids=[0, *[1] * 6, *[2] * 4])
    assert lay_out([[Text([1]), Visual([0], [IMAGE])]], 4, pad_id=PAD).group_ids is None


@pytest.mark.parametrize("rotary_3d", [False, True])
def test_a_row_of_no_examples_is_padding(rotary_3d):
    row = lay_out([], 3, pad_id=7, rotary_3d=rotary_3d)
    check(
        row,
        tokens=[7] * 3,
        positions=np.zeros((3, 3) if rotary_3d else 3),
        segment_ids=[0] * 3,
        visual_index=[-1] * 3,
        targets=[7] * 3,
        loss_weights=[0] * 3,
    )

"""The small release: what its files say, and refusals."""

import json

import pytest

import vlm_jax
from tests.advice import tried
from vlm_jax.checkpoints.hub import CheckpointFileError
from vlm_jax.pretrained.small import write_small_release

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return vlm_jax.from_pretrained(write_small_release(tmp_path_factory.mktemp("small"), words=("Which", " colour")))


def test_a_picture_has_64_tokens(small):
    """32 x 32 pixels in patches of 4."""
    assert small.count_visual_tokens([(50, 80)]) == [(32 // 4) ** 2]


def test_words_and_tags_are_tokens_of_their_own(small):
    ids = small.tokenizer.encode("Which colour?<box>")
    assert [small.tokenizer.decode([one], skip_special=False) for one in ids[-4:]] == ["Which", " colour", "?", "<box>"]


def test_its_template_marks_the_answer_with_its_end(small, tmp_path):
    from vlm_jax.data.squares import draw_square

    said = [*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    batch = small.processor(said, images=[draw_square("red", 0, 0)], targets=True)
    learned = batch.targets[0][batch.loss_weights[0] > 0]
    assert small.tokenizer.decode([int(one) for one in learned], skip_special=False) == " red</s>"


def test_another_seed_has_other_weights(small, tmp_path):
    other = vlm_jax.from_pretrained(write_small_release(tmp_path / "other", seed=1))
    name = "multi_modal_projector.linear_1.weight"
    assert (small.checkpoint[name][...] != other.checkpoint[name][...]).any()
    assert json.loads((other.folder / "config.json").read_text())["model_type"] == "llava"


def test_a_folder_with_a_checkpoint_is_refused(small):
    with pytest.raises(CheckpointFileError):
        write_small_release(small.folder)


def test_more_words_than_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=tried("words: expected at most {}, got {}; pass fewer")):
        write_small_release(tmp_path, words=tuple(f"word{number}" for number in range(100)))
    write_small_release(tmp_path, words=tuple(f"word{number}" for number in range(58)))

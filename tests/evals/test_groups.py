"""The group of a question follows from its task, or else from the metric that is chosen for it."""

import pytest

from vlm_jax.evals.groups import group_of_task, is_multi_turn
from vlm_jax.evals.vqa import num_turns
from vlm_jax.types import Sample, Turn, dialogue


@pytest.mark.parametrize(
    ("task", "chosen", "group"),
    [
        ("transcribe", {}, "OCR"),
        ("ocr_line:8x16", {}, "OCR"),
        ("docvqa", {}, "OCR"),  # by ANLS
        ("mme:OCR", {}, "OCR"),
        ("mme:count", {}, None),
        ("locate", {}, "grounding"),
        ("grefcoco", {}, "grounding"),
        ("mine", {"mine": "box"}, "grounding"),
        ("mine", {}, None),
        ("count", {}, None),
    ],
)
def test_tasks(task, chosen, group):
    assert group_of_task(task, chosen) == group


def test_turns():
    assert [is_multi_turn(row) for row in ({"turns": 1}, {"turns": 2})] == [False, True]
    asked = dialogue([Turn("Who?", "she"), Turn("Where?", "there")])
    system = {"role": "system", "content": "Be brief."}
    assert [num_turns(Sample("a", messages)) for messages in (asked[:2], asked, (system, *asked))] == [1, 2, 2]

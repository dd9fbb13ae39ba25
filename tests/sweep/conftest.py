"""A tiny release and questions, some of which it answers as the references have it."""

import json

import pytest

import vlm_jax

from .releases import MAX_NEW_TOKENS, conversation, write_questions, write_release

ASKED = [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0)]  # (record, turn) of the five questions


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """(folder of the release, file of questions, what it answers to each of them by itself)."""
    folder = tmp_path_factory.mktemp("evaluation")
    release, questions = folder / "release", folder / "questions.jsonl"
    write_release(release)
    model = vlm_jax.from_pretrained(release)
    write_questions(questions, [["x"], ["x", "x"], ["x"], ["x"]])

    def ask(record, turn):
        return model.generate(conversation(turn), [folder / f"{record}.png"], max_new_tokens=MAX_NEW_TOKENS)

    # The release ends at whatever it says last to the first question.
    (release / "generation_config.json").write_text(json.dumps({"eos_token_id": [ask(0, 0).tokens[-1], 2]}))
    model = vlm_jax.from_pretrained(release)
    answers = [ask(*place) for place in ASKED]
    # References are the release's own answers, but for that of the last question.
    texts = [answer.text or "x" for answer in answers]
    write_questions(questions, [[texts[0]], texts[1:3], [texts[3]], ["?!"]])
    return release, questions, answers

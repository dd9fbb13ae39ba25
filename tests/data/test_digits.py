"""The digit source: answers derived again from the pages, streams reproduced from (seed, index)."""

import re

import numpy as np
import pytest

from vlm_jax.config import ConfigError, parse
from vlm_jax.data import SOURCES
from vlm_jax.data.source import Tools
from vlm_jax.types import CellBatch, images_of, text_of

from ..advice import tried


def format_box(box, height, width):
    return f"{box} of {height}x{width}"


def prepare_image(image):
    return image.astype(np.float32) / 255


TOOLS = Tools(
    format_box=format_box,
    read_image=lambda path: None,
    image_size=lambda path: None,
    prepare_image=prepare_image,
    video_size=lambda path: None,
)
SMALL = {"rows": 3, "cols": 4, "page_size": 48, "variants": 1, "evaluation_size": 20}


def opened(**options):
    return parse(SOURCES["digits"], {**SMALL, **options}, "config.data").open(TOOLS)


def page_of(source, sample, seed_keys):
    """The page of a sample, composed again from its generator's keys."""
    pages = source._train_pages if seed_keys[0] == 0 else source._test_pages
    page = pages.compose(np.random.default_rng(seed_keys))
    if sample.images:
        np.testing.assert_array_equal(sample.images[0], page.pixels)
    return page


def turns(sample):
    """(question, answer) of every turn."""
    texts = [text_of(message) for message in sample.messages]
    return list(zip(texts[::2], texts[1::2], strict=True))


def answer_by_search(question: str, page) -> str:
    """The answer, found by going through the page cell by cell."""
    words = question.split()
    cells = [(row, col, int(page.classes[row, col])) for row in range(3) for col in range(4)]
    if words[0] == "read":
        _, _, row, _, col = words
        return next(str(digit) for r, c, digit in cells if (r + 1, c + 1) == (int(row), int(col)))
    if words[0] == "transcribe":
        return "".join(str(digit) for row, _, digit in cells if row + 1 == int(words[2]))
    if words[0] == "count":
        return str(sum(digit == int(words[1]) for _, _, digit in cells))
    _, _, row, _, col = words
    return f"{[int(edge) for edge in page.boxes[int(row) - 1, int(col) - 1]]} of 48x48"


def test_answers_of_the_training_stream_are_right():
    source = opened(turns_per_page=5)
    stream = source.train("questions", seed=3)
    for index in range(60):
        sample = stream[index]
        assert len(turns(sample)) == 5
        page = page_of(source, sample, (0, 3, 0, index))
        for question, answer in turns(sample):
            assert answer == answer_by_search(question, page)
        assert sample.question.split()[0] == sample.task
        assert [len(images_of(message)) for message in sample.messages] == [1] + [0] * 9


def test_answers_of_the_evaluation_are_right_and_every_task_has_its_share():
    source = opened()
    samples = source.evaluation(seed=0)
    assert [sample.task for sample in samples] == [
        task for task in ("read", "transcribe", "count", "locate") for _ in range(20)
    ]
    for number, sample in enumerate(samples):
        ((question, answer),) = turns(sample)
        page = page_of(source, sample, (1, 0, 0, number // 20, number % 20))
        assert answer == answer_by_search(question, page)
    assert len({sample.sample_id for sample in samples}) == len(samples)


def test_questions_have_the_four_forms_and_stay_on_the_page():
    stream = opened().train("questions", seed=0)
    forms = r"read row [123] column [1234]|transcribe row [123]|count \d|locate row [123] column [1234]"
    questions = [question for index in range(300) for question, _ in turns(stream[index])]
    assert all(re.fullmatch(forms, question) for question in questions)
    # Every cell and row is asked for, and each digit counted.
    assert len(set(questions)) == 12 + 3 + 10 + 12


def test_a_counted_digit_is_usually_on_the_page_and_sometimes_not():
    stream = opened(task_weights={"count": 1.0}).train("questions", seed=0)
    answers = [int(answer) for index in range(250) for _, answer in turns(stream[index])]
    # One in five asks for any digit, which 12 cells lack with probability 0.9 ** 12 = 0.28: 5.6% in all.
    absent = np.mean(np.array(answers) == 0)
    assert abs(absent - 0.2 * 0.9**12) < 5 * np.sqrt(0.056 * 0.944 / 1000)


def test_tasks_are_asked_by_their_weights():
    source = opened(task_weights={"read": 3.0, "locate": 1.0, "count": 0.0})
    assert source.tasks == ("read", "locate")
    stream = source.train("questions", seed=0)
    asked = [question.split()[0] for index in range(250) for question, _ in turns(stream[index])]
    assert set(asked) == {"read", "locate"}
    assert abs(np.mean(np.array(asked) == "read") - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 1000)
    assert {sample.task for sample in source.evaluation(0)} == {"read", "locate"}


def test_an_element_depends_on_seed_and_index_alone():
    one, two = opened().train("questions", seed=5), opened().train("questions", seed=5)
    for index in (7, 0, 10**12):
        _, ours, theirs = two[3], one[index], two[index]
        np.testing.assert_array_equal(ours.images[0], theirs.images[0])
        assert ours.messages == theirs.messages
        assert ours.sample_id == theirs.sample_id == f"digits/train/5/{index}"
    assert (one[1].images[0] != one[2].images[0]).any()
    assert (one[1].images[0] != opened().train("questions", seed=6)[1].images[0]).any()


def test_the_evaluation_of_a_task_is_fixed_by_the_seed_whatever_else_is_asked():
    alone = opened(task_weights={"count": 1.0}).evaluation(seed=2)
    among = [sample for sample in opened(augment=False).evaluation(seed=2) if sample.task == "count"]
    assert [sample.messages for sample in alone] == [sample.messages for sample in among]
    for ours, theirs in zip(alone, among, strict=True):
        np.testing.assert_array_equal(ours.images[0], theirs.images[0])
    assert [s.messages for s in alone] != [s.messages for s in opened(task_weights={"count": 1.0}).evaluation(seed=3)]


@pytest.mark.parametrize(("name", "key", "scale", "count"), [("text_pages", 1, 1, 7), ("fine_text_pages", 4, 3, 5)])
def test_text_pages_hold_the_digits_in_reading_order_and_boxes_of_cells(name, key, scale, count):
    source = opened(text_scale=3, turns_per_text_page=7, turns_per_page=5)
    stream, located = source.train(name, seed=1), 0
    for index in range(40):
        sample = stream[index]
        assert sample.images == ()
        page = page_of(source, sample, (0, 1, key, index))
        digits = ""
        for row in range(3):
            digits += "".join(str(page.classes[row, col]) * scale for col in range(4)) * scale
        assert sample.messages[0]["content"][0] == {"type": "text", "text": digits}
        assert len(digits) == source.settings.text_streams[name]
        assert len(turns(sample)) == count
        for question, answer in turns(sample):
            if not question.startswith("locate"):
                assert answer == answer_by_search(question, page)
                continue
            located += 1
            row, col = int(question.split()[2]) - 1, int(question.split()[4]) - 1
            assert answer == format_box([12 * col, 16 * row, 12 * col + 12, 16 * row + 16], 48, 48)
    assert located > 10 if name == "fine_text_pages" else not located
    tasks = {"read", "transcribe", "count", "locate"}
    assert {s.task for s in source.evaluation(0, name)} == tasks - ({"locate"} if name == "text_pages" else set())


def test_a_share_of_the_fine_pages_has_one_character_a_cell():
    """The questions, and the pages of the evaluation, are those without the share."""
    fine, mixed = (opened(coarse_share=share).train("fine_text_pages", 0) for share in (0.0, 0.25))
    contexts = {True: 0, False: 0}
    for index in range(200):
        one, other = fine[index], mixed[index]
        assert one.messages[1:] == other.messages[1:]
        texts = [sample.messages[0]["content"][0]["text"] for sample in (one, other)]
        contexts[texts[0] != texts[1]] += 1
        if texts[0] != texts[1]:
            rows = [texts[0][start : start + 8] for start in range(0, 48, 16)]
            assert texts[1] == "".join(row[::2] for row in rows), (texts, index)
    assert 30 < contexts[True] < 70  # 50 are expected, with a standard deviation of 6
    evaluations = (
        opened(coarse_share=share, evaluation_size=4).evaluation(0, "fine_text_pages") for share in (0.0, 1.0)
    )
    assert [sample.messages for sample in next(evaluations)] == [sample.messages for sample in next(evaluations)]


def test_text_pages_need_a_task():
    with pytest.raises(ConfigError, match=tried("no task of the stream text_pages has a weight above 0; set one of")):
        opened(task_weights={"locate": 1.0}).train("text_pages", seed=1)
    assert opened(task_weights={"locate": 1.0, "read": 1.0}).train("text_pages", seed=1)[0].task == "read"


def test_cells_hold_classes_and_boxes_as_fractions():
    source = opened(augment=False)
    element = source.train("cells", seed=4)[9]
    assert isinstance(element, CellBatch)
    page = source._train_pages.compose(np.random.default_rng((0, 4, 2, 9)))
    np.testing.assert_array_equal(element.images[0, 0], page.pixels.astype(np.float32) / 255)
    assert element.images.shape == (1, 1, 48, 48, 1)
    np.testing.assert_array_equal(element.classes, page.classes[None])
    np.testing.assert_allclose(element.boxes, page.boxes[None] / 48, atol=1e-7)
    # All ink of the page is inside of the boxes.
    image = element.images[0, 0, :, :, 0].copy()
    for left, top, right, bottom in np.rint(element.boxes.reshape(-1, 4) * 48).astype(int):
        assert image[top:bottom, left:right].any()
        image[top:bottom, left:right] = 0
    assert not image.any()
    assert len(source.evaluation(0, "cells")) == 20


def test_only_training_pages_are_augmented():
    source = opened(noise=20.0)
    paper = [np.mean(source.train("questions", 0)[index].images[0] == 0) for index in range(20)]
    clean = [np.mean(sample.images[0] == 0) for sample in source.evaluation(0)]
    # Noise makes half of the paper brighter than black.
    assert np.mean(clean) > np.mean(paper) + 0.15
    plain = opened(augment=False)._train_pages.compose(np.random.default_rng(0)).pixels
    assert not ((plain > 0) & (plain < 24)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"task_weights": {"reed": 1.0}},
            r"config\.data\.task_weights\.reed: no such task; did you mean 'read'",
        ),
        ({"task_weights": {"read": -1.0}}, r"config\.data\.task_weights\.read: expected at least 0"),
        ({"task_weights": {"read": 0.0}}, r"config\.data\.task_weights: no task has a weight"),
        ({"turns_per_page": 0}, r"config\.data\.turns_per_page: expected at least 1"),
        ({"evaluation_size": 0}, r"config\.data\.evaluation_size: expected at least 1"),
        ({"max_digit": 99}, r"config\.data\.max_digit: a digit of 99 pixels does not fit"),
        ({"max_digits": 9}, r"config\.data\.max_digits: unknown or unused key; did you mean 'max_digit'"),
    ],
)
def test_options_that_cannot_be_met_are_refused_by_their_key(options, message):
    with pytest.raises(ConfigError, match=message):
        opened(**options)


def test_an_unknown_stream_is_refused():
    with pytest.raises(ConfigError, match="digits: no stream 'question'; did you mean 'questions'"):
        opened().train("question", seed=0)

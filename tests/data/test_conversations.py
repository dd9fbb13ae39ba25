"""Files of visual questions: what is read, what a corrupt image does, and which lines are rejected."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from PIL import Image

from vlm_jax.config import ConfigError, parse
from vlm_jax.data import SOURCES
from vlm_jax.data.conversations import TooManyCorruptImages
from vlm_jax.data.record_files import Rules, open_records
from vlm_jax.data.source import Tools
from vlm_jax.data.stores import MalformedRecords
from vlm_jax.evals.vqa import group_of
from vlm_jax.processors.video import RateSampler
from vlm_jax.sweep.questions import Questions
from vlm_jax.types import VideoSize, images_of, text_of


def read_image(path, *, channels, max_pixels):
    """An image of the number that its file holds; a file without a number is corrupt."""
    with open(path) as file:
        value = int(file.read())
    assert max_pixels == 1000
    return np.full((2, 3, channels), value, np.uint8)


TOOLS = Tools(
    format_box=lambda *a: "",
    read_image=read_image,
    image_size=lambda path, *, max_pixels: read_image(path, channels=3, max_pixels=max_pixels).shape[:2],
    prepare_image=lambda image: image,
    video_size=lambda path, *, max_pixels: VideoSize(4, 2, 3),
)


def write(folder, name, count, corrupt=()):
    (folder / "images").mkdir(exist_ok=True)
    lines = []
    for number in range(count):
        picture = folder / "images" / f"{name}{number}"
        picture.write_text("broken" if number in corrupt else str(number))
        record = {
            "id": number,
            "image": f"images/{name}{number}",
            "question": f"q{number}",
            "answer": f"a{number}",
        }
        lines.append(json.dumps(record))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def opened(folder, corrupt=(), **options):
    section = {
        "train_path": write(folder, "train", 10, corrupt),
        "evaluation_path": write(folder, "test", 6, corrupt),
        "max_pixels": 1000,
        **options,
    }
    return parse(SOURCES["conversations"], section, "config.data").open(TOOLS)


def numbers(dataset, count):
    return [int(dataset[index].images[0][0, 0, 0]) for index in range(count)]


def test_a_sample_is_its_line_and_its_image(tmp_path):
    source = opened(tmp_path, channels=1)
    samples = list(source.evaluation(seed=0))
    assert [int(sample.images[0].max()) for sample in samples] == list(range(6))
    assert [(sample.question, sample.answer, sample.task) for sample in samples] == [
        (f"q{number}", f"a{number}", "vqa") for number in range(6)
    ]
    assert samples[4].sample_id == f"{tmp_path}/test.jsonl:4"
    assert samples[4].images[0].shape == (2, 3, 1)
    assert source.tasks == ("vqa",)
    assert source.channels == 1


def test_training_goes_through_every_record_once_an_epoch_in_another_order(tmp_path):
    stream = opened(tmp_path).train("questions", seed=1)
    read = numbers(stream, 30)
    for epoch in range(3):
        assert sorted(read[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert read[:10] != read[10:20]
    assert read == numbers(opened(tmp_path).train("questions", seed=1), 30)
    assert read != numbers(opened(tmp_path).train("questions", seed=2), 30)


def test_a_corrupt_image_is_named_counted_once_and_skipped(tmp_path, caplog):
    source = opened(tmp_path, corrupt=(3, 4), max_corrupt=2)
    whole = numbers(opened(tmp_path / "..", max_corrupt=2).train("questions", seed=1), 30)
    opened(tmp_path, corrupt=(3, 4), max_corrupt=2)
    with caplog.at_level(logging.WARNING):
        read = numbers(source.train("questions", seed=1), 30)
    # Records 3 and 4 are replaced by the next that can be read; nothing else moves.
    assert read == [5 if number in (3, 4) else number for number in whole]
    assert sorted(source.trained["train_path"][0].corrupt) == ["3", "4"]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert sum("record '3' skipped" in warning and "'broken'" in warning for warning in warnings) == 1
    assert "(2 of at most 2)" in warnings[1]


def test_one_corrupt_image_too_many_is_an_error_that_names_them_all(tmp_path):
    stream = opened(tmp_path, corrupt=(2, 5, 7), max_corrupt=2).train("questions", seed=0)
    with pytest.raises(TooManyCorruptImages, match=r"3 records .* config\.data\.max_corrupt=2") as caught:
        numbers(stream, 10)
    for number in (2, 5, 7):
        assert f"\n  {number}: invalid literal" in str(caught.value)


def test_the_limit_is_no_corrupt_image_by_default_and_a_missing_file_counts(tmp_path):
    source = opened(tmp_path)
    (tmp_path / "images" / "test2").unlink()
    with pytest.raises(TooManyCorruptImages, match=r"test\.jsonl: 1 records .* over config\.data\.max_corrupt=0"):
        list(source.evaluation(seed=0))


def test_a_file_without_any_readable_image_is_an_error_below_the_limit(tmp_path):
    stream = opened(tmp_path, corrupt=range(10), max_corrupt=50).train("questions", seed=0)
    with pytest.raises(TooManyCorruptImages, match=r"train\.jsonl: no record has a readable image"):
        stream[0]


def test_the_evaluation_leaves_corrupt_records_out_and_can_be_read_again(tmp_path):
    evaluation = opened(tmp_path, corrupt=(1,), max_corrupt=1).evaluation(seed=0)
    for _ in range(2):
        assert [int(sample.images[0].max()) for sample in evaluation] == [0, 2, 3, 4, 5]


def test_a_smaller_evaluation_is_drawn_by_the_seed_in_the_order_of_the_file(tmp_path):
    drawn = [
        [int(s.images[0].max()) for s in opened(tmp_path, evaluation_size=3).evaluation(seed=seed)]
        for seed in (0, 0, 1, 2, 3, 4)
    ]
    assert drawn[0] == drawn[1]
    assert len({tuple(indices) for indices in drawn}) > 1
    assert all(indices == sorted(set(indices)) and len(indices) == 3 for indices in drawn)


def test_turns_of_a_conversation_are_trained_together_and_asked_one_by_one(tmp_path):
    source = opened(tmp_path, tasks=("chat", "yes_no"))
    line = {
        "id": "c",
        "image": ["images/test0", "images/test1"],
        "turns": [["x", "1"], ["y", "2"]],
        "references": [["1", "one"], ["2"]],
        "task": "yes_no",
    }
    (tmp_path / "test.jsonl").write_text(json.dumps(line))
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    settings = dataclasses.replace(source.settings, num_images=2)
    asked = list(settings.open(TOOLS).evaluation(seed=0))
    assert [sample.sample_id.split(":")[1] for sample in asked] == ["c#1", "c#2"]
    assert [sample.question for sample in asked] == ["x", "y"]
    assert [sample.references for sample in asked] == [("1", "one"), ("2",)]
    assert {sample.task for sample in asked} == {"yes_no"}
    assert all(len(sample.images) == 2 and len(sample.messages) == 2 for sample in asked)
    assert all(images_of(sample.messages[0]) == [{"type": "image"}] * 2 for sample in asked)
    (record,) = open_records(str(tmp_path / "test.jsonl"), Rules(("chat", "yes_no"), 2), "train_path")
    assert [text_of(message) for message in record.messages] == ["x", "1", "y", "2"]


def test_every_question_of_a_conversation_can_be_asked_with_what_is_before_it(tmp_path):
    source = opened(tmp_path, num_images=None)
    turns = [("system", "be brief"), ("human", "<image>\nx"), ("gpt", "1"), ("human", "y"), ("gpt", "2")]
    turns += [("human", "<image>\nz"), ("gpt", "3")]
    line = {
        "id": "c",
        "image": ["images/test3", "images/test4"],
        "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
        "references": ["3", "three"],
    }
    single = {"id": "d", "image": "images/test5", "conversations": line["conversations"][1:3]}
    (tmp_path / "test.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(single))
    asked = dataclasses.replace(source.settings, evaluation_turns="all").open(TOOLS)
    samples = list(asked.evaluation(seed=0))
    assert [sample.sample_id.split(":")[1] for sample in samples] == ["c#1", "c#2", "c#3", "d"]
    assert [(sample.question, sample.answer) for sample in samples] == [("x", "1"), ("y", "2"), ("z", "3"), ("x", "1")]
    assert [len(sample.messages) for sample in samples] == [3, 5, 7, 2]
    assert [[int(image.max()) for image in sample.images] for sample in samples] == [[3], [3], [3, 4], [5]]
    assert [sample.references for sample in samples] == [(), (), ("3", "three"), ()]
    named = [(sample.sample_id, sample.answer) for sample in samples]
    assert list(asked.references(seed=0)) == named
    assert [sample.answer for sample in asked.evaluation(seed=0, stream="captions")] == ["3", "1"]
    assert [answer for _, answer in asked.references(seed=0, stream="captions")] == ["3", "1"]
    groups = [group_of(sample) for sample in samples]  # those of whole records, as where only the last one is asked
    assert len(set(groups[:3])) == 1 and groups[3] != groups[0]
    last = list(dataclasses.replace(source.settings).open(TOOLS).evaluation(seed=0))
    assert [group_of(sample) for sample in last] == groups[2:]
    assert [(sample.sample_id.split(":")[1], sample.answer) for sample in last] == [("c", "3"), ("d", "1")]
    for number in (3, 4, 5):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / "images" / f"test{number}", "PNG")
    questions = Questions(str(tmp_path / "test.jsonl"), 3, RateSampler(), turns="all")
    assert list(questions.references()) == named and len(questions) == 4
    assert [next(questions.start_at(number)).answer for number in range(4)] == ["1", "2", "3", "1"]


def test_answers_that_are_not_learned_are_context_of_the_questions_that_are_asked(tmp_path):
    source = opened(tmp_path, num_images=None)

    def turn(question, answer, **further):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **further}]

    shot, asked = [*turn("a", "1"), {"role": "user", "content": "b"}], [{"role": "assistant", "content": "2"}]
    lines = [
        {"id": "few", "prompt": shot, "completion": asked},
        {"id": "own", "messages": [*turn("a", "1", loss=False), *turn("b", "2"), *turn("c", "3", weight=0)]},
        {"id": "zero", "messages": [*turn("a", "1", weight=0.0), *turn("b", "2", weight=0.5), *turn("c", "3")]},
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples = list(dataclasses.replace(source.settings, evaluation_turns="all").open(TOOLS).evaluation(seed=0))
    named = [(sample.sample_id.split(":")[1], sample.answer) for sample in samples]
    assert named == [("few", "2"), ("own#1", "2"), ("own#2", "3"), ("zero#1", "2"), ("zero#2", "3")]
    assert [len(sample.messages) for sample in samples] == [4, 4, 6, 4, 6]
    # Without pictures the record is the group.
    assert [group_of(sample).split(":")[1] for sample in samples] == ["few", "own", "own", "zero", "zero"]


def test_the_last_answer_of_a_conversation_is_the_reference_and_the_rest_its_prompt(tmp_path):
    source = opened(tmp_path)
    turns = [("system", "be brief"), ("human", "<image>\nx"), ("gpt", "1"), ("human", "<image>"), ("gpt", "2")]
    line = {
        "id": "c",
        "image": ["images/test3", "images/test4"],
        "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
        "references": ["2", "two"],
    }
    (tmp_path / "test.jsonl").write_text(json.dumps(line))
    settings = dataclasses.replace(source.settings, num_images=None)
    (asked,) = settings.open(TOOLS).evaluation(seed=0)
    assert asked.sample_id == f"{tmp_path}/test.jsonl:c" and asked.references == ("2", "two")
    assert [int(image.max()) for image in asked.images] == [3, 4]
    assert [message["role"] for message in asked.messages] == ["system", *["user", "assistant"] * 2]
    assert [len(images_of(message)) for message in asked.messages] == [0, 1, 0, 1, 0]
    assert [text_of(message) for message in asked.messages] == ["be brief", "x", "1", "", "2"]
    assert (asked.question, asked.answer) == ("", "2")


GOOD = {"id": "g", "image": "a.png", "question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "x", ', "not JSON: "),
        ("[1, 2]", "expected a JSON object, got list"),
        (json.dumps({**GOOD, "id": "x", "imge": "b"}), "unknown key 'imge'; did you mean 'image'"),
        (json.dumps({"id": "x", "question": "q", "answer": "a"}), "0 images, but config.data.num_images is 1"),
        (json.dumps({**GOOD, "id": 1.5}), "id: expected a string or an integer, got 1.5"),
        (json.dumps({**GOOD, "id": "x", "image": []}), "0 images, but config.data.num_images is 1"),
        (json.dumps({**GOOD, "id": "x", "image": [""]}), "image: expected a path, a data URL or bytes, got ''"),
        (json.dumps({**GOOD, "id": "x", "image": ["a", "b"]}), "2 images, but config.data.num_images is 1"),
        (json.dumps({**GOOD, "id": "x", "task": "chat"}), "task 'chat' is not one of config.data.tasks: vqa"),
        (json.dumps({**GOOD, "id": "x", "turns": [["q", "a"]]}), "both 'turns' and 'question' are given"),
        (json.dumps({"id": "x", "image": "a", "turns": []}), "turns: expected a list of .* pairs"),
        (
            json.dumps({"id": "x", "image": "a", "turns": [["q"]]}),
            "expected a question and an answer, .* got \\['q'\\]",
        ),
        (json.dumps({"id": "x", "image": "a", "question": "q"}), "key 'answer' is missing"),
        (json.dumps({**GOOD, "id": "x", "answer": ""}), ".* two non-empty strings, got"),
    ],
)
def test_a_faulty_line_is_named_when_the_file_is_opened(tmp_path, line, message):
    path = tmp_path / "set.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(MalformedRecords, match=rf"1 lines .*\n.*set\.jsonl:3: {message}"):
        open_records(str(path), Rules(("vqa",), 1), "train_path")


def test_all_faulty_lines_are_reported_together(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(["nonsense"] * 23))
    with pytest.raises(MalformedRecords, match=r"(?s)23 lines .*:1: .*:20: .*and 3 more"):
        open_records(str(path), Rules(("vqa",), 1), "train_path")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 4}, r"config\.data\.channels: .* got 4"),
        ({"tasks": ()}, r"config\.data\.tasks: expected at least one"),
        ({"num_images": 0}, r"config\.data\.num_images: expected at least 1"),
        ({"max_corrupt": -1}, r"config\.data\.max_corrupt: expected at least 0"),
        ({"evaluation_size": 0}, r"config\.data\.evaluation_size: expected at least 1"),
        ({"train_path": "nowhere.jsonl"}, r"config\.data\.train_path: there is no file '.*nowhere\.jsonl'"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_by_their_key(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, **options)


def test_training_and_evaluation_may_not_be_the_same_file(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.data\.evaluation_path: is train_path"):
        opened(tmp_path, evaluation_path=str(tmp_path / "train.jsonl"))


def test_a_file_without_records_and_an_unknown_stream_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match=r"config\.data\.evaluation_path: '.*empty\.jsonl' has no record"):
        opened(tmp_path, evaluation_path=str(tmp_path / "empty.jsonl"))
    with pytest.raises(ConfigError, match="no stream 'cells'; known here: captions, preferences, questions"):
        opened(tmp_path).train("cells", seed=0)

"""Accuracy and its interval, and what counts as an answer."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.stats import binomtest

from configs import base
from vlm_jax.build import build
from vlm_jax.build.settings import EvaluationSettings
from vlm_jax.config import ConfigError
from vlm_jax.evals import vqa
from vlm_jax.evals.intervals import wilson_interval
from vlm_jax.evals.metrics import chosen_metrics
from vlm_jax.evals.vqa import group_of, judged_answer
from vlm_jax.generation import text as generation_text
from vlm_jax.generation.engine import Generated
from vlm_jax.generation.text import Completion
from vlm_jax.processors.documents_vocabulary import documents_tokenizer
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.types import Sample, Turn, dialogue


@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 1), (1, 1), (0, 7), (7, 7), (3, 10), (1, 400), (399, 400), (250, 400)]
)
def test_the_interval_is_wilsons(successes, trials):
    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    low, high = wilson_interval(successes, trials)
    np.testing.assert_allclose((low, high), (expected.low, expected.high), atol=1e-12)
    assert 0.0 <= low <= successes / trials <= high <= 1.0


def test_an_interval_needs_a_trial():
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0, 0)


def box(*numbers):
    return "<box>({},{}),({},{})</box>".format(*numbers)


def sample(name, task, answer="7"):
    picture = np.zeros((48, 48, 1), np.uint8)
    return Sample(name, dialogue([Turn("read 0 0", answer)], num_images=1), (picture,), task)


@pytest.mark.parametrize(
    ("task", "text", "reason", "correct"),
    [
        ("ocr:1x4", "abcd", "end", 1.0),
        ("ocr:1x4", "abxd", "end", 0.75),
        ("ocr_line:1x4", "abxd", "end", 0.75),
        ("ocr", "abxd", "end", 0.75),  # of a record, without a size
        ("ocr:1x4", "abcdefgh", "length", 0.5),  # what has no end counts as far as it is written
        ("read", "abcd", "end", True),
        ("read", "abxd", "end", False),
        ("read", "abcd", "length", False),
        ("ocrs", "abxd", "end", False),
        ("exact:ocr", "abxd", "end", False),  # the name of a metric
    ],
)
def test_a_score_is_a_share_where_the_metric_is_one_and_else_right_or_wrong(task, text, reason, correct):
    given, _ = judged_answer({}, documents_tokenizer(), sample("x", task, "abcd"), Completion(text, (), reason))
    assert given == correct and type(given) is type(correct)


def test_the_metric_of_a_task_can_be_chosen():
    def score(chosen, task):
        return judged_answer(chosen, documents_tokenizer(), sample("x", task, "abcd"), Completion("abxd", (), "end"))[0]

    assert score({"read": "characters"}, "read") == score({"read": "characters"}, "read:1") == 0.75
    assert score({"ocr": "exact"}, "ocr:1x4") is False
    assert score({"ocr": "exact", "ocr:1x4": "characters"}, "ocr:1x4") == 0.75  # of one size


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("read=exat",), r"task 'read': there is no metric 'exat'; did you mean 'exact'\?"),
        (("read",), r"expected task=metric, as in vqa=anls, got 'read'"),
        (("=anls",), r"expected task=metric, as in vqa=anls, got '=anls'"),
        (("read=exact", "read=anls"), r"expected one metric for task 'read', got 'exact' and 'anls'"),
    ],
)
def test_a_choice_of_a_metric_that_cannot_be(given, message):
    with pytest.raises(ConfigError, match=rf"config\.x: {message}"):
        chosen_metrics(given, "config.x")
    assert chosen_metrics(("read=exact", "ocr:1x4=anls"), "config.x") == {"read": "exact", "ocr:1x4": "anls"}


class Lower(Tokenizer):
    """A tokenizer that writes everything in lower case."""

    def __init__(self):
        pass

    def encode(self, text):
        return text.lower()

    def decode(self, ids):
        return ids


def test_any_of_several_references_is_right_and_is_kept_as_the_tokenizer_writes_it():
    several = dataclasses.replace(sample("x", "read", "AB"), references=("AB", "C D"))
    lower = Lower()
    for text, right, kept in (("AB", True, ("AB", "C D")), ("c d", True, ("ab", "c d")), ("e", False, ("AB", "C D"))):
        score, response = judged_answer({}, lower, several, Completion(text, (), "end"))
        assert (score, response.references) == (right, kept)


def test_answers_about_the_same_pictures_are_a_group():
    def group(*values, videos=(), name="x"):
        pictures = tuple(np.full((2, 3, 1), value, np.uint8) for value in values)
        return group_of(Sample(name, dialogue([Turn("q", "a")]), pictures, videos=videos))

    assert group(1, name="x#1") == group(1, name="x#2") and len({group(1), group(2), group(1, 2), group(1, 1)}) == 4
    assert group(videos=("a.mp4",)) != group(videos=(b"b",)) and group(name="x#1") == "x#1"
    turned = np.zeros((3, 2, 1), np.uint8)
    assert group_of(Sample("x", dialogue([Turn("q", "a")]), (turned,))) != group(0)


@pytest.fixture(scope="module")
def experiment():
    return build(base.get_config())


def settings(batch_size, max_new_tokens=24):
    return EvaluationSettings(batch_size, question_length=8, max_new_tokens=max_new_tokens)


def generated(rows, eos, watch):
    lengths = [row.index(eos) + 1 if eos in row else len(row) for row in rows]
    watch(np.asarray(rows), np.asarray(lengths))
    return Generated(np.asarray(rows), np.asarray(lengths), steps=0, transfers=1)


def test_answers_are_generated_in_batches_cut_at_their_end_and_scored(monkeypatch, experiment):
    system = experiment.system
    tokenizer = system.processor.tokenizer
    digits = tokenizer.encode("749")
    seven = tokenizer.encode("7")
    assert tokenizer.decode(digits) == "749"
    eos, length = tokenizer.eos_id, 24
    there = tokenizer.encode(box(0, 0, 100, 90))
    written = [
        (sample("right", "read"), [*seven, eos, *digits], "7", True),  # what follows the end is not read
        (sample("wrong", "read", "4"), [*seven, eos], "7", False),
        (sample("long", "transcribe", "749"), [*digits, eos], "749", True),
        (sample("endless", "read", "749"), (digits * length)[:length], None, False),
        (sample("box", "locate", box(0, 0, 100, 100)), [*there, eos], box(0, 0, 100, 90), True),
    ]
    queue, sizes = [ids + [tokenizer.pad_id] * (length - len(ids)) for _, ids, _, _ in written], []

    def stand_in(model, params, batch, *, max_new_tokens, end_ids, pad_id, watch, **options):
        assert (model, max_new_tokens, end_ids, pad_id) == (system.model, length, [eos], tokenizer.pad_id)
        sizes.append(batch.tokens.shape[0])
        rows, queue[:2] = queue[:2], []
        return generated(rows + [rows[-1]] * (2 - len(rows)), eos, watch)

    monkeypatch.setattr(generation_text, "generate", stand_in)
    read = []

    def samples():
        for given, *_ in written:
            read.append(given.sample_id)
            yield given

    answers = []
    for answer in vqa.answers(experiment, {}, samples(), settings(2)):
        answers.append(answer)
        assert len(read) <= len(answers) + 1  # pictures of one batch are held, not all
    assert sizes == [2, 2, 2]  # one program: the last batch is padded
    assert len(answers) == len(written)
    for answer, (given, _, text, correct) in zip(answers, written, strict=True):
        asked = (given.sample_id, given.task, given.question, given.answer)
        assert (answer.sample_id, answer.task, answer.question, answer.reference) == asked
        assert text is None or answer.text == text
        assert answer.correct is correct, given.sample_id
        assert (answer.references, answer.is_finished) == ((given.answer,), given.sample_id != "endless")
    assert len({answer.group for answer in answers}) == 1  # of one picture


@pytest.mark.parametrize(("axes", "given"), [({"data": 8}, True), ({"data": 4, "context": 2}, False), (None, False)])
def test_answers_are_shared_out_over_the_devices_of_the_parameters(monkeypatch, experiment, axes, given):
    mesh = None if axes is None else make_mesh(MeshSettings(**axes))
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    eos, meshes = experiment.system.processor.tokenizer.eos_id, []

    def stand_in(*args, mesh, watch, **options):
        meshes.append(mesh)
        return generated([[eos]], eos, watch)

    monkeypatch.setattr(generation_text, "generate", stand_in)
    list(vqa.answers(experiment, {"kernel": jax.device_put(np.ones(2), sharding)}, [sample("x", "read")], settings(1)))
    assert meshes == [mesh if given else None]


def test_an_endless_answer_is_wrong_even_when_its_text_is_right(monkeypatch, experiment):
    ids = experiment.system.processor.tokenizer.encode("7")
    monkeypatch.setattr(generation_text, "generate", lambda *args, watch, **kwargs: generated([ids], None, watch))
    (answer,) = vqa.answers(experiment, {}, [sample("x", "read")], settings(1))
    assert answer.text == "7" == answer.reference and not answer.correct


def test_a_prompt_or_reference_answer_over_its_limit_is_named(experiment):
    picture = np.zeros((48, 48, 1), np.uint8)
    asked = Sample("page", dialogue([Turn("read row 12 column 12 1 1", "1")], num_images=1), (picture,))
    key = r"config\.evaluation\.question_length by 2 or more"
    with pytest.raises(SequenceTooLong, match=rf"'page' is 26 tokens .* raise {key}"):
        list(vqa.answers(experiment, {}, [asked], settings(1)))
    with pytest.raises(SequenceTooLong, match=r"'x': .* 4 tokens .* of 3; raise config\.evaluation\.max_new_tokens"):
        list(vqa.answers(experiment, {}, [sample("x", "read", "123")], settings(1, max_new_tokens=3)))

"""lmms-eval itself, as a process, on tasks written here over local files: its answers and numbers are ours.

It is installed without what it asks for, in a folder of its own (see the Makefile), and needs no network.
"""

import importlib
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
import rich.console
from PIL import Image

import vlm_jax
from tests.advice import tried
from tests.processes.conftest import environment
from tests.sweep.releases import MAX_NEW_TOKENS, write_release
from vlm_jax.config import ConfigError
from vlm_jax.generation.sampling import GenerationError
from vlm_jax.processors.learned import PromptError
from vlm_jax.sweep.evaluation import Evaluation, ReleaseEvaluation

INSTALLED = pathlib.Path(sys.prefix) / "lmms_eval"
BUDGETS = {"none@released": "", "visionzip@16": "token_budget=16,reducer=visionzip", "visionzip@4": ""}
BUDGETS["visionzip@4"] = BUDGETS["visionzip@16"].replace("16", "4")
CHOICES = ["red", "green", "blue"]
QUESTIONS = 10
UTILS = '''
"""The tasks of the test."""

import pathlib

from PIL import Image
from rapidfuzz.distance import Levenshtein

FOLDER = pathlib.Path(__file__).parent.parent


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["conversations"][0]["value"].removeprefix("<image>\\n")


def visual(doc):
    return [Image.open(FOLDER / doc["image"]).convert("RGB")]


def messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "image", "url": image} for image in visual(doc)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text(doc)}]}]


def target(doc):
    return doc["conversations"][1]["value"]


def place(doc):
    return int(doc["id"]) % 3


def read(doc, results):
    said, wanted = results[0].strip(), target(doc).strip()
    return {"characters": 1 - Levenshtein.distance(said, wanted) / max(len(said), len(wanted), 1)}


def round_text(doc, lmms_eval_specific_kwargs=None, round_idx=None, previous_output=None, previous_round_info=None):
    if round_idx is None:
        return text(doc)
    asked = [] if previous_round_info is None else previous_round_info
    question = f"after {previous_output[-1]!r}?"
    return visual(doc), question, round_idx == 2, previous_output, [*asked, question]


def rounds(doc, results):
    return {"rounds": len(results[0])}
'''
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_visual: !function utils.visual
"""
READ = """
output_type: generate_until
doc_to_text: !function utils.text
doc_to_messages: !function utils.messages
doc_to_target: !function utils.target
process_results: !function utils.read
generation_kwargs: {{max_new_tokens: {limit}, do_sample: false, temperature: 0, top_p: 1.0, num_beams: 1, until: []}}
metric_list: [{{metric: characters, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = """
output_type: multiple_choice
doc_to_text: !function utils.text
doc_to_target: !function utils.place
doc_to_choice: [red, green, blue]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROUNDS = """
output_type: generate_until_multi_round
doc_to_text: !function utils.round_text
doc_to_target: !function utils.target
process_results: !function utils.rounds
generation_kwargs: {{max_new_tokens: {limit}, until: []}}
metric_list: [{{metric: rounds, aggregation: mean, higher_is_better: true}}]
"""


def evaluated(folder, data, workdir):
    """{point: its line of results, its answers} of `cli.evaluate`."""
    settings = {"reducers": ("none", "visionzip"), "budgets": (16, 4), "batch_size": 4, "metrics": ("vqa=characters",)}
    console = rich.console.Console(file=io.StringIO())
    evaluation = Evaluation(
        ReleaseEvaluation(str(folder / "release"), str(data), max_new_tokens=MAX_NEW_TOKENS, **settings),
        workdir,
        console=console,
    )
    assert evaluation.run() == {}
    points = workdir / "points"
    return {
        one["label"]: (one, lines(points / one["label"] / "answers.jsonl")) for one in lines(workdir / "results.jsonl")
    }


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_records(folder, references):
    """Questions about pictures, in the form of LLaVA's files."""
    lines = []
    for number, reference in enumerate(references):
        said = [
            {"from": "human", "value": f"<image>\nwhat is in it{'?' * number}"},
            {"from": "gpt", "value": reference},
        ]
        record = {"id": str(number), "image": f"{number}.png", "conversations": said}
        lines.append(json.dumps(record))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A release, pictures, and questions whose references are near to the answers of some budget."""
    folder = tmp_path_factory.mktemp("tasks")
    write_release(folder / "release")
    rng = np.random.default_rng(0)
    for number in range(QUESTIONS):
        Image.fromarray(rng.integers(0, 256, (24, 30, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "utils.py").write_text(UTILS)
    data = write_records(folder, ["x"] * QUESTIONS)
    first = evaluated(folder, data, folder / "first")
    answers = [first[label][1] for label in BUDGETS]
    references = [answers[number % 3][number]["text"].strip()[:3] or "x" for number in range(QUESTIONS)]
    data = write_records(folder, references)
    for name, form in (("read", READ), ("choose", CHOOSE), ("rounds", ROUNDS)):
        text = form if form is CHOOSE else form.format(limit=MAX_NEW_TOKENS)
        (folder / "tasks" / f"{name}.yaml").write_text(TASK.format(name=f"test_{name}", data=data) + text)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    """What `cli.evaluate` finds."""
    return evaluated(folder, folder / "questions.jsonl", folder / "second")


@pytest.fixture(scope="module")
def theirs(folder):
    """{(run, task): the scores of lmms-eval, its samples}: one process for all budgets and tasks."""
    runs, given = [], {}
    for name, tasks, label, more in (
        ("none@released", "read,rounds", "none@released", {"batch_size": 4}),
        ("visionzip@16", "read", "visionzip@16", {"batch_size": 8}),
        ("visionzip@4", "read", "visionzip@4", {"batch_size": 1}),
        ("simple", "choose,read", "visionzip@4", {"batch_size": 8, "force_simple": True}),
    ):
        given[name] = [f"test_{task}" for task in tasks.split(",")]
        run = {
            "model": "vlm_jax",
            "model_args": ",".join(filter(None, [f"pretrained={folder / 'release'}", BUDGETS[label]])),
            "tasks": ",".join(given[name]),
            "include_path": str(folder / "tasks"),
            "output_path": str(folder / "out" / name),
            "log_samples": True,
        }
        runs.append({**run, **more})
    (folder / "runs.yaml").write_text(json.dumps(runs))
    path = os.pathsep.join([environment()["PYTHONPATH"], str(INSTALLED)])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    words = [sys.executable, "-m", "lmms_eval", f"--config={folder / 'runs.yaml'}", "--reasoning_tags=none"]
    done = subprocess.run(
        words, cwd=folder, env={**environment(), **offline, "PYTHONPATH": path}, capture_output=True, timeout=600
    )
    log = done.stdout.decode()[-5000:] + done.stderr.decode()[-5000:]
    found = {}
    for name, tasks in given.items():
        written = sorted((folder / "out" / name).rglob("*.json*"))
        assert len(written) == 1 + len(tasks), log
        (scores,) = [json.loads(path.read_text())["results"] for path in written if path.suffix == ".json"]
        for task in tasks:
            (samples,) = [lines(path) for path in written if path.name.endswith(f"_samples_{task}.jsonl")]
            found[name, task.removeprefix("test_")] = scores[task], samples
    return found


@pytest.mark.parametrize("label", BUDGETS)
def test_answers_and_the_frontier_are_those_of_evaluate(ours, theirs, label):
    """Sample by sample, their scores and numbers of visual tokens, and the mean; in batches of 1 and of 8."""
    (result, answers), (scores, samples) = ours[label], theirs[label, "read"]
    assert [sample["doc_id"] for sample in samples] == list(range(QUESTIONS))
    assert [sample["filtered_resps"] for sample in samples] == [answer["text"] for answer in answers]
    assert [sample["characters"] for sample in samples] == [answer["correct"] for answer in answers]
    counts = [sample["token_counts"][0] for sample in samples]
    assert [[one["visual_tokens"]] for one in counts] == [answer["visual_tokens"] for answer in answers]
    assert all(0 < one["output_tokens"] <= MAX_NEW_TOKENS for one in counts)
    assert math.isclose(scores["characters,none"], result["accuracy"]["vqa"]["mean"])


def test_the_frontier_has_three_points(ours, theirs):
    """Answers differ between the budgets, and so do the scores."""
    texts = [tuple(sample["filtered_resps"] for sample in theirs[label, "read"][1]) for label in BUDGETS]
    assert len(set(texts)) == 3
    assert len({theirs[label, "read"][0]["characters,none"] for label in BUDGETS}) > 1
    assert [ours[label][1][0]["visual_tokens"] for label in BUDGETS] == [[36], [16], [4]]


def test_choices_are_those_of_the_likelihood(folder, theirs):
    """What lmms-eval takes for right is the choice with the greatest log-likelihood."""
    model = vlm_jax.from_pretrained(folder / "release", token_budget=4, reducer="visionzip")
    scores, samples = theirs["simple", "choose"]
    right = []
    for number, sample in enumerate(samples):
        image = {"type": "image", "image": str(folder / f"{number}.png")}
        content = [image, {"type": "text", "text": f"what is in it{'?' * number}"}]
        found = model.log_likelihoods([{"role": "user", "content": content}], [f" {one}" for one in CHOICES])
        values, greedy = zip(*sample["filtered_resps"], strict=True)
        np.testing.assert_allclose([-float(one) for one in values], [one.log_likelihood for one in found], rtol=1e-5)
        assert list(greedy) == [str(one.is_greedy) for one in found]
        right.append(float(np.argmax([one.log_likelihood for one in found]) == number % 3))
    assert [sample["acc"] for sample in samples] == right and 0 < sum(right) < QUESTIONS
    assert math.isclose(scores["acc,none"], sum(right) / QUESTIONS)


def test_each_round_is_asked_after_the_answer_before(folder, theirs):
    model = vlm_jax.from_pretrained(folder / "release")
    for number, sample in enumerate(theirs["none@released", "rounds"][1]):
        image, said = {"type": "image", "image": str(folder / f"{number}.png")}, []
        for _ in range(2):
            question = f"after {said[-1]!r}?" if said else f"what is in it{'?' * number}"
            content = [image, {"type": "text", "text": question}]
            said.append(model.generate([{"role": "user", "content": content}], max_new_tokens=MAX_NEW_TOKENS).text)
        assert sample["filtered_resps"] == said
        assert sample["token_counts"][0]["visual_tokens"] == 2 * 36


def test_without_messages_the_answers_are_the_same(theirs):
    """`--force_simple`: pictures, then the text."""
    said = [[sample["filtered_resps"] for sample in theirs[run, "read"][1]] for run in ("simple", "visionzip@4")]
    assert said[0] == said[1] and len(said[0]) == QUESTIONS


@pytest.fixture(scope="module")
def harness():
    """The module of the adapter, and lmms-eval's `Instance`; importing lmms-eval warns of much."""
    sys.path.append(str(INSTALLED))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("vlm_jax.harnesses.lmms_eval"), importlib.import_module("lmms_eval.api.instance")


@pytest.fixture(scope="module")
def model(harness, folder):
    made = harness[0].ChatModel(pretrained=str(folder / "release"), max_new_tokens=2)
    made.task_dict["test"] = {"test": [{"number": 0}]}
    return made


def instance(harness, kind, *arguments):
    return harness[1].Instance(kind, arguments, 0, {"task": "test", "doc_id": 0, "repeats": 1})


def test_arguments_of_the_model_are_checked(harness, folder, monkeypatch):
    make, given = harness[0].ChatModel, {"pretrained": str(folder / "release")}
    with pytest.raises(ConfigError, match=r"model_args\.device: unknown or unused key"):
        make(**given, device="cuda")
    with pytest.raises(ConfigError, match="batch_size: expected a whole number, got 'auto'"):
        make(**given, batch_size="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=tried("WORLD_SIZE: expected one process; run lmms-eval without a launcher")):
        make(**given)
    monkeypatch.delenv("WORLD_SIZE")
    assert make(**given, batch_size="8").batch_size == 8


def test_likelihoods_without_a_document_are_refused(harness, model):
    """As of the metric acc_mutual_info; without it, a request has a document. A target is a log-likelihood."""
    words = tried("remove the metric acc_mutual_info, which takes the largest number where acc takes the smallest")
    with pytest.raises(GenerationError, match=words):
        model.loglikelihood([instance(harness, "loglikelihood", "", " red")])
    document = (lambda doc: [], 0, "test", "test")
    choice = instance(harness, "loglikelihood", "which?", " red", *document)
    whole = instance(harness, "loglikelihood", "which?", lambda doc: " red", *document)
    (loss, greedy), (likelihood, same) = model.loglikelihood([choice, whole])
    assert loss == -likelihood > 0 and greedy == same


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"type": "audio", "url": "a.wav"}, "no item of type 'audio' is read"),
        ({"type": "video", "url": "a.mp4", "start_time": 1.0}, "the key 'start_time' of an item of type 'video'"),
    ],
)
def test_items_that_are_not_read_are_named(harness, model, item, message):
    request = instance(harness, "generate_until", "", lambda doc: asked(item), {"until": []}, 0, "test", "test")
    with pytest.raises(PromptError, match=message):
        model.generate_until([request])


def asked(item):
    return [{"role": "user", "content": [item, {"type": "text", "text": "which?"}]}]


def test_a_stretch_of_a_video_is_refused(harness, model, folder):
    """Its path alone is read, as are the bytes of a picture."""
    kept = {"path": str(folder / "0.png"), "bytes": None}
    item = {"type": "image", "url": {**kept, "video_start": 1}}
    words = tried("{}: the key '{}' of a {} is not read; remove it")
    for url in (item["url"], kept, {"bytes": (folder / "0.png").read_bytes()}):
        message = asked({"type": "image", "url": url})
        request = instance(harness, "generate_until", "", lambda doc, m=message: m, {}, 0, "test", "test")
        if "video_start" in url:
            with pytest.raises(PromptError, match=words):
                model.generate_until([request])
        else:
            (answer,) = model.generate_until([request])
            assert answer.token_counts.visual_tokens == 36 and answer.token_counts.output_tokens == 2


def test_media_are_told_by_what_they_are(harness):
    """Of requests without messages; audio is refused by the processor."""
    kinds = [harness[0].user_message([one], "")[0]["content"][0]["type"] for one in ("a.png", "b/c.MP4", "d.wav")]
    assert kinds == ["image", "video", "audio"]
    with pytest.raises(PromptError, match="expected a Pillow image, or the path of an image or a video"):
        harness[0].user_message([3], "")

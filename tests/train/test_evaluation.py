"""Evaluations on the way and at the end: kept answers, kills, and answers of the exported folder."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

import vlm_jax
from configs import finetune
from tests.contracts import releases
from vlm_jax.build import build
from vlm_jax.checkpoints.orbax import Resumed
from vlm_jax.checkpoints.runs import read_parts
from vlm_jax.config import ConfigError
from vlm_jax.evals.evaluators import evaluator_of
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.sharding.rules import placed
from vlm_jax.train import loop
from vlm_jax.train.best import Best
from vlm_jax.train.copies import Copies
from vlm_jax.train.evaluation import Evaluations
from vlm_jax.train.loop import Interrupted, Trainer

from ..advice import tried
from .conftest import tiny_config

EVERY, NUM_ROWS = 3, 2


class Sums:
    """An evaluator whose rows are the sum of the parameters; `on_row` is called before each."""

    every = EVERY

    def __init__(self, on_row=lambda total, number: None):
        self.on_row, self.asked = on_row, 0

    def check(self):
        pass

    def rows(self, params):
        total = sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(params["encoder"]))
        for number in range(NUM_ROWS):
            self.on_row(self.asked, number)
            yield {"number": number, "total": total}
        self.asked += 1

    def metrics(self, rows):
        totals = [row["total"] for row in rows]
        return {"sum": {"mean": sum(totals) / len(totals)}, "n": len(totals)}

    def lines(self, metrics):
        return [f"sum {metrics['n']}"]


def seeing_config():
    """One stage of a few steps, with evaluations inside it."""
    config = tiny_config()
    with config.unlocked():
        del config.stages.answering
        config.schedule = ("seeing",)
        config.stages.seeing.update({"steps": 8, "batch_size": 2})
        config.loop.update({"log_every": 4, "writers": ()})
        config.evaluation.every = EVERY
    return config


@pytest.fixture
def config():
    return seeing_config()


def train(config, mesh, workdir, evaluator, told=None, **more):
    def tell(step, lines):
        if told is not None:
            told.append((step, *lines))

    return Trainer(config, build(config), mesh, workdir, evaluator=evaluator, tell=tell, **more).run()


def kept(workdir):
    return {path.name: path.read_text() for path in [*workdir.glob("evaluation*.json*"), *workdir.glob("eval*/*")]}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(one_device, tmp_path_factory):
    """Files of the evaluations of a run that was never interrupted."""
    config, workdir, told = seeing_config(), tmp_path_factory.mktemp("whole"), []
    train(config, one_device, workdir / "run", Sums(), told)
    return workdir / "run", told


def test_evaluations_are_made_every_n_steps_and_at_the_end(whole):
    workdir, told = whole
    assert told == [(step, f"sum {NUM_ROWS}") for step in (3, 6, 8)]
    lines = read(workdir / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 8]
    totals = []
    for line in lines:
        rows = read(workdir / "evaluations" / f"{line['step']}.jsonl")
        assert [row["number"] for row in rows] == list(range(NUM_ROWS))
        assert line["sum"]["mean"] == rows[0]["total"] == rows[1]["total"]
        totals.append(rows[0]["total"])
    assert len(set(totals)) == 3  # of other parameters each
    final = json.loads((workdir / "evaluation.json").read_text())
    assert final == {name: lines[-1][name] for name in ("sum", "n")}


class Killed(Exception):
    pass


def test_a_run_killed_in_its_evaluations_makes_them_once_and_the_same(config, whole, one_device, tmp_path):
    def kill(asked, number):
        if number == 1:
            raise Killed

    with pytest.raises(Killed):  # in the first evaluation, before any checkpoint
        train(config, one_device, tmp_path, Sums(kill))
    assert [path.name for path in (tmp_path / "evaluations").iterdir()] == ["3.jsonl.partial"]

    def kill_at_4(step, steps, line):
        if step == 4:
            raise Killed

    with pytest.raises(Killed):  # after the first evaluation, which is repeated with its steps
        train(config, one_device, tmp_path, Sums(), progress=kill_at_4)
    assert [line["step"] for line in read(tmp_path / "evaluations.jsonl")] == [3]
    second = Sums(lambda asked, number: kill(asked, number) if asked == 1 else None)
    with pytest.raises(Killed):  # in the second; the newest checkpoint, of step 5, is before it
        train(config, one_device, tmp_path, second)
    third = Sums(lambda asked, number: kill(asked, number) if asked == 1 else None)
    with pytest.raises(Killed):  # in the last, behind the last checkpoint
        train(config, one_device, tmp_path, third)
    last = Sums()
    train(config, one_device, tmp_path, last)
    assert (second.asked, third.asked, last.asked) == (1, 1, 1)
    assert kept(tmp_path) == kept(whole[0])


def test_the_checkpoint_of_the_best_evaluation_is_kept_and_resumed_from(config, whole, one_device, tmp_path):
    class Scored(Sums):
        """Sums with a score: the next of those given."""

        def __init__(self, *scores):
            super().__init__()
            self.scores = list(scores)

        def metrics(self, rows):
            return super().metrics(rows) | {"score": self.scores.pop(0)}

    def kill_at_4(step, steps, line):
        if step == 4:
            raise Killed

    with config.unlocked():
        config.loop.keep, config.loop.keep_best = 1, "score"
        config.loop.save_every = 5
    with pytest.raises(Killed):
        train(config, one_device, tmp_path, Scored(0.9), progress=kill_at_4)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]  # no step of save_every
    later = Scored(0.4, 0.9)
    train(config, one_device, tmp_path, later)
    assert later.asked == 2  # of steps 6 and 8
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "8"]
    curves = [[line["loss"] for line in read(folder / "metrics.jsonl")] for folder in (tmp_path, whole[0])]
    assert curves[0] == curves[1] and len(curves[0]) == 8
    shapes = placed(build(config).boxed_shapes(), one_device)
    found = read_parts(tmp_path / "checkpoints" / "3", {"encoder": shapes["encoder"]})
    total = sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(found))
    assert total == read(whole[0] / "evaluations" / "3.jsonl")[0]["total"]


def test_the_best_evaluation_of_a_copy_that_a_run_resumes_from_has_a_checkpoint(
    config, whole, one_device, tmp_path, monkeypatch
):
    copy = {}

    class OfStep6(Copies):
        """Stands for copies on hosts, of which one has that of step 6."""

        def is_due(self, step):
            return step == 6

        def save(self, step, state):
            copy[step] = jax.tree.map(np.asarray, state)

        def newest(self, checkpoints, like, position):
            if 6 not in copy:
                return super().newest(checkpoints, like, position)
            return Resumed(6, jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), copy[6], like(6)), position(6))

    def kill(asked, number):
        if asked == 1:  # at step 6, of which there is a copy
            raise Killed

    monkeypatch.setattr(loop, "Copies", OfStep6)
    with config.unlocked():
        config.loop.keep, config.loop.keep_best, config.loop.best_is = 1, "sum/mean", "highest"
        config.loop.save_every = 100
    first, second = Sums(kill), Sums()
    first.metrics = lambda rows: {"sum": {"mean": 0.0}, "n": len(list(rows))}
    with pytest.raises(Killed):
        train(config, one_device, tmp_path, first)
    second.metrics = lambda rows: {"sum": {"mean": 2.0 - second.asked}, "n": len(list(rows))}
    train(config, one_device, tmp_path, second)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "8"]
    shapes = placed(build(config).boxed_shapes(), one_device)
    found = read_parts(tmp_path / "checkpoints" / "6", {"encoder": shapes["encoder"]})
    total = sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(found))
    assert total == read(whole[0] / "evaluations" / "6.jsonl")[0]["total"]


def test_evaluations_are_compared_by_a_number_of_theirs():
    lines = [
        {"step": step, "settings": {}, "accuracy": {"vqa": {"mean": mean, "n": 4}}, "loss": loss}
        for step, mean, loss in ((2, 0.25, 3.0), (4, 0.5, float("nan")), (6, 0.5, 2.0), (8, 0.25, 2.0))
    ]
    assert Best("accuracy/vqa/mean").step(lines) == 4
    assert Best("accuracy/vqa/mean", "lowest").step(lines) == 2
    assert Best("loss", "lowest").step(lines) == 6
    assert Best("loss").step([]) is None and Best().step(lines) is None
    with pytest.raises(ConfigError, match="step 2 has no number 'accuracy/vqa'; did you mean 'accuracy/vqa/"):
        Best("accuracy/vqa").step(lines)


def test_a_best_checkpoint_that_other_settings_no_longer_keep_is_named(config, tmp_path, caplog):
    with config.unlocked():
        config.loop.keep_best = "score"
    path, given = epath.Path(tmp_path), (config, 8, lambda step, lines: None, Best("score"))
    lines = [{"step": step, "settings": {}, "score": score} for step, score in ((2, 0.9), (4, 0.5), (6, 0.7), (8, 0.8))]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = Evaluations(Sums(), path, *given)
    evaluations.start(6, [4, 6, 8])  # that of step 8 is removed with its steps
    assert evaluations.best is None
    assert "checkpoint 6 is the best by score of evaluations with other settings or data" in caplog.text


def test_a_best_evaluation_needs_some_during_the_training(config, one_device, tmp_path):
    with config.unlocked():
        config.loop.keep_best = "sum/mean"
    evaluator = Sums()
    evaluator.every = None
    told = tried("config.loop.keep_best: all evaluations but the last are off; set config.evaluation.every")
    with pytest.raises(ConfigError, match=told):
        Trainer(config, build(config), one_device, tmp_path, evaluator=evaluator)
    Trainer(config, build(config), one_device, tmp_path, evaluator=Sums())


def test_sigterm_in_an_evaluation_saves_the_step_and_leaves_the_evaluation(config, whole, one_device, tmp_path):
    stopped = Sums(lambda asked, number: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="saved at step 3 of 8"):
        train(config, one_device, tmp_path, stopped)
    assert (tmp_path / "checkpoints" / "3").is_dir() and stopped.asked == 0
    train(config, one_device, tmp_path, Sums())
    assert kept(tmp_path) == kept(whole[0])


def test_sigterm_in_the_evaluation_at_the_end_of_a_stage_resumes_in_the_next(one_device, tmp_path):
    config = tiny_config()
    with config.unlocked():
        for stage in config.stages.values():
            stage.steps, stage.warmup_steps = EVERY, 0
        config.loop.writers, config.evaluation.every = (), EVERY
    train(config, one_device, tmp_path / "whole", Sums())
    stopped = Sums(lambda asked, number: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="saved at step 3 of 6"):
        train(config, one_device, tmp_path / "parts", stopped)
    assert stopped.asked == 0
    train(config, one_device, tmp_path / "parts", Sums())
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole")


def test_references_that_no_answer_can_equal_are_named_before_training(config, one_device, tmp_path):
    with config.unlocked():
        config.evaluation.max_new_tokens = 1
    with pytest.raises(SequenceTooLong, match=r"digits/test/.* over the limit of 1; raise config\.evaluation"):
        train(config, one_device, tmp_path / "run", evaluator_of(build(config), config))
    assert not (tmp_path / "run").exists()


ROOM = {"llava": 3, "qwen2_5_vl": 3 * 64}  # tiles, or patches, of the pictures of a row
DTYPES = {"llava": "bfloat16", "qwen2_5_vl": "float32"}  # of a run; what it trains is float32


@pytest.fixture(scope="module", params=ROOM)
def released(request, tmp_path_factory):
    """A release's name and folder, with questions about no picture to two pictures of any size."""
    folder = tmp_path_factory.mktemp(request.param)
    releases.make(request.param, folder)
    rng, records = np.random.default_rng(0), []
    for number, sizes in enumerate([[(24, 16)], [(16, 16), (32, 20)], [], [(17, 31)], [(30, 30)]]):
        names = [f"{number}-{place}.png" for place in range(len(sizes))]
        for name, (width, height) in zip(names, sizes, strict=True):
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
        question = "<image>\n" * len(names) + f"what is {number}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"a{number}"}]
        records.append({"id": number, "image": names, "conversations": turns})
    for name in ("train", "evaluation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return request.param, folder


def release_config(name, folder):
    config = finetune.get_config()
    with config.unlocked():
        config.release, config.dtype = str(folder), DTYPES[name]
        config.row.update({"length": 256, "images": ROOM[name]})
        config.data.update({f"{name}_path": str(folder / f"{name}.jsonl") for name in ("train", "evaluation")})
        config.stages.instruction.update({"steps": 3, "batch_size": 2, "warmup_steps": 1})
        config.stages.instruction.learning_rates = ConfigDict({"connector": 1e-2, "decoder": 1e-2})
        config.evaluation.update({"batch_size": 2, "max_new_tokens": 8})
        config.loop.writers = ()
    return config


def question(folder, record):
    """The prompt of a record, as messages and pictures."""
    text = record["conversations"][0]["value"].replace("<image>\n", "")
    content = [*[{"type": "image"}] * len(record["image"]), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}], [folder / name for name in record["image"]]


def test_the_exported_folder_answers_as_the_runs_evaluation(released, one_device, tmp_path):
    name, folder = released
    config, workdir = release_config(name, folder), tmp_path / "run"
    experiment = build(config)
    trainer = Trainer(config, experiment, one_device, workdir, evaluator=evaluator_of(experiment, config))
    outcome = trainer.run()
    rows = read(workdir / "evaluations" / "3.jsonl")
    experiment.system.save_pretrained(tmp_path / "exported", outcome.params)
    exported = vlm_jax.from_pretrained(tmp_path / "exported", dtype=DTYPES[name])
    records = read(folder / "evaluation.jsonl")
    assert [row["reference"] for row in rows] == [f"a{number}" for number in range(len(records))]
    asked = [question(folder, record) for record in records]
    said = []
    for start in range(0, len(asked), 2):  # a batch of two, the last one filled by itself as in the evaluation
        group = (asked[start : start + 2] * 2)[:2]
        messages, pictures = zip(*group, strict=True)
        said += exported.system.answer(exported.params, messages, pictures, max_new_tokens=8)
    said = said[: len(asked)]
    assert [row["text"] for row in rows] == [answer.text for answer in said]
    assert [row["tokens_by_span"][0] for row in rows] == [sum(answer.visual_tokens[:1]) for answer in said]
    assert len({row["text"] for row in rows}) > 1
    # One by one, as the command `generate` asks.
    with config.unlocked():
        config.evaluation.batch_size = 1
    alone = list(evaluator_of(experiment, config).rows(outcome.params))
    for row, (messages, pictures) in zip(alone, asked, strict=True):
        assert row["text"] == exported.generate(messages, pictures, max_new_tokens=8).text

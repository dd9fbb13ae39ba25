"""DPO in the trainer: the reference is the policy at the stage's start, also after an interruption."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.data.stores import MalformedRecords
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.input import rows
from vlm_jax.train.loop import Interrupted, Trainer
from vlm_jax.train.stages import parse_schedule
from vlm_jax.train.workdir import read_lines

from .conftest import tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    records = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (24, 24), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        chosen, rejected = ("7", "3") if number % 2 else ("12", "5")
        records.append({"prompt": "read", "chosen": chosen, "rejected": rejected, "image": f"{number}.png"})
    for name in ("train", "evaluation"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "plain.jsonl").write_text(json.dumps({"question": "read", "answer": "7", "image": "0.png"}))
    return folder


def config_of(data, train="train.jsonl", **changes):
    config = tiny_config().unlock()
    files = {"train_path": str(data / train), "evaluation_path": str(data / "evaluation.jsonl")}
    config.data = ConfigDict({"kind": "conversations", "channels": 1, **files})
    stage = {"objective": "prefer", "stream": "preferences", "beta": 0.5, "steps": 4, "batch_size": 4,
             "warmup_steps": 0, "accumulate": 1, "learning_rates": {"connector": 5e-3, "decoder": 5e-3}}  # fmt: skip
    config.stages, config.schedule = ConfigDict({"pairs": {**stage, **changes}}), ("pairs",)
    config.optimizer.epsilon = 1e-3  # no update from the rounding of a gradient of 0
    config.loop.update({"save_every": 100, "log_every": 1})
    return config


def train(config, mesh, workdir, **settings):
    return Trainer(config, build(config), mesh, workdir, **settings).run()


def lines(workdir):
    return read_lines(epath.Path(workdir) / "metrics.jsonl")


@pytest.fixture(scope="module")
def finished(data, one_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, train(config_of(data), one_device, workdir)


def test_the_first_loss_is_that_of_the_reference_and_margins_grow(finished):
    found = lines(finished[0])
    np.testing.assert_allclose(found[0]["loss"], np.log(2), rtol=1e-6)
    assert abs(found[0]["reward_margin"]) < 1e-5 and abs(found[0]["reward_chosen"]) < 1e-5
    assert found[-1]["reward_margin"] > 0.01 and found[-1]["loss"] < np.log(2)
    for line in found[1:]:
        np.testing.assert_allclose(line["reward_margin"], line["reward_chosen"] - line["reward_rejected"], atol=1e-5)


def test_an_interrupted_run_keeps_its_reference(finished, data, one_device, tmp_path):
    def terminate(step, steps, metrics):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    config = config_of(data)
    with pytest.raises(Interrupted):
        train(config, one_device, tmp_path, progress=terminate)
    train(config, one_device, tmp_path)
    ours, whole = lines(tmp_path), lines(finished[0])
    assert [line["loss"] for line in ours] == [line["loss"] for line in whole]


def test_eight_devices_and_accumulation_equal_one(finished, data, tmp_path):
    config = config_of(data, accumulate=2)
    outcome = train(config, make_mesh(MeshSettings(data=2, context=2, tensor=2)), tmp_path)
    for name in ("loss", "reward_margin", "accuracy"):
        ours, whole = ([line[name] for line in lines(folder)] for folder in (tmp_path, finished[0]))
        first = int(name == "accuracy")  # before the first step margins are 0 but for rounding, which tells who wins
        np.testing.assert_allclose(ours[first:], whole[first:], atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), outcome.params, dict(finished[1].params))


def test_pairs_and_conversations_are_not_mistaken_for_each_other(data):
    def first(config):
        (span,) = parse_schedule(("pairs",), config.stages)
        return rows(build(config), span.stage, 0)[0]

    with pytest.raises(MalformedRecords, match=r"plain.jsonl:.*expected a pair of answers, 'chosen' and 'rejected'"):
        first(config_of(data, "plain.jsonl"))
    plain = config_of(data)
    plain.stages.pairs = {**{key: value for key, value in plain.stages.pairs.items() if key != "beta"}}
    plain.stages.pairs.update({"objective": "next_token", "stream": "questions"})
    with pytest.raises(MalformedRecords, match="has a 'rejected' answer, which only the objective prefer learns from"):
        first(plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, r"pairs\.beta: expected above 0, got 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing: expected at least 0 and below 0\.5"),
        ({"z_loss": 1e-4}, "z_loss: is a key of the objective next_token; remove it"),
        ({"stream": "questions"}, "prefer takes preferences, got 'questions'"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(data, one_device, tmp_path, changes, message):
    config = config_of(data, **changes)
    with pytest.raises(ConfigError, match=message):
        Trainer(config, build(config), one_device, tmp_path / "run")


def test_packed_rows_are_refused(data, one_device, tmp_path):
    config = config_of(data)
    config.row.update({"text_length": None, "length": 64, "images": 2, "pack": True})
    with pytest.raises(ConfigError, match=r"set config\.row\.pack to False"):
        Trainer(config, build(config), one_device, tmp_path / "run")

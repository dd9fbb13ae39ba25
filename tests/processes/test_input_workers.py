"""Batches made by separate processes: the same ones, to the same curve, with errors that come through."""

import json
import multiprocessing

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests.train.conftest import tiny_config
from vlm_jax.build import build
from vlm_jax.data.conversations import TooManyCorruptImages
from vlm_jax.data.loader import batch_at, batches
from vlm_jax.train.input import rows
from vlm_jax.train.stages import parse_schedule


def files(folder, cut=()):
    """The rows of eight small images; those of `cut` end too early."""
    for number in range(8):
        path = folder / f"{number}.png"
        Image.new("L", (24, 24), 30 * number).save(path)
        if number in cut:
            path.write_bytes(path.read_bytes()[:40])
    for name in ("train", "test"):
        lines = [{"id": f"page{i}", "image": f"{i}.png", "question": "count 3", "answer": str(i)} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = tiny_config()
    with config.unlocked():
        config.schedule = ("answering",)
        paths = {"train_path": str(folder / "train.jsonl"), "evaluation_path": str(folder / "test.jsonl")}
        config.data = ConfigDict({"kind": "conversations", "channels": 1, **paths})
    (span,) = parse_schedule(tuple(config.schedule), {"answering": config.stages.answering})
    return rows(build(config), span.stage, 0)


def test_workers_make_the_same_batches_resume_and_are_gone_when_closed(tmp_path):
    stream = files(tmp_path)
    before = len(multiprocessing.active_children())
    iterator = batches(stream, 4, num_workers=2)
    for step in range(3):
        jax.tree.map(np.testing.assert_array_equal, next(iterator), batch_at(stream, 4, step))
    assert len(multiprocessing.active_children()) == before + 2
    iterator.close()
    assert len(multiprocessing.active_children()) == before
    again = batches(stream, 4, num_workers=1, start=3)
    jax.tree.map(np.testing.assert_array_equal, next(again), batch_at(stream, 4, 3))
    again.close()


def test_an_error_of_a_worker_is_raised_here(tmp_path):
    iterator = batches(files(tmp_path, cut=range(8)), 1, num_workers=1)
    with pytest.raises(TooManyCorruptImages, match="page"):
        next(iterator)
    iterator.close()


def test_the_command_line_takes_workers_to_the_same_curve(command, tmp_path):
    curves = []
    for workers in (0, 2):
        arguments = [f"--config.loop.input_workers={workers}", "--config.stages.answering.steps=4"]
        status, errors = command.finish(tmp_path / str(workers), *arguments)
        assert status == 0, errors
        lines = [json.loads(line) for line in (tmp_path / str(workers) / "metrics.jsonl").read_text().splitlines()]
        assert all(line["input_seconds"] >= 0 for line in lines)
        curves.append([line["loss"] for line in lines])
    assert curves[0] == curves[1]

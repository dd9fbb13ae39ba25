"""Memory of an evaluation does not grow with the number of its samples."""

import io
import itertools
import tracemalloc

import pytest
import rich.console
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from vlm_jax.build import build
from vlm_jax.evals.evaluators import evaluator_of
from vlm_jax.generation.text import Completion
from vlm_jax.sweep.point_run import PointRunner
from vlm_jax.sweep.run import Sweep
from vlm_jax.system import System
from vlm_jax.train.evaluation import Evaluations
from vlm_jax.train.loop import Outcome
from vlm_jax.train.workdir import read_lines

from .files import config_of, records, write

FEW, MANY = 8, 48
SIZE = 20_000  # bytes of each answer
KEPT = 300_000  # bytes: fewer than of the answers or of the pictures of MANY - FEW samples


def in_a_run(config, workdir):
    """(an evaluation during training, the file of its answers)."""
    evaluator = evaluator_of(build(config), config)
    told = Evaluations(evaluator, workdir, config, 4, lambda step, lines: None)
    workdir.mkdir()
    return lambda: told.make(4, {}, lambda: False, lambda step, metrics: None), workdir / "evaluations" / "4.jsonl"


def in_a_sweep(config, workdir):
    """(the evaluation of a point, the file of its answers)."""
    sweep = ConfigDict({"base": config, "candidates": {"pool": {"budgets": (4,), "connector": {"kind": "pool"}}}})
    sweep.sweep = ConfigDict({"shared": (), "seeds": (0,), "controls": ()})
    console = rich.console.Console(file=io.StringIO())
    made = Sweep(sweep, workdir, config_path="x.py", console=console)
    runner = PointRunner(sweep.base, (), workdir)
    runner.train = lambda *_, keep, halving: Outcome({}, None, None)

    def run():
        runner.run(made.points[0], lambda *_: None, command="", timed=False, keep=False)

    return run, workdir / "points" / "pool@4" / "answers.jsonl"


@pytest.mark.parametrize("answered", [in_a_run, in_a_sweep])
def test_22_an_evaluation_of_many_samples_keeps_what_one_of_few_keeps(folder, tmp_path, monkeypatch, answered):
    """Traced memory at every batch: its peak would hide what is kept beside what a batch needs for a moment."""
    numbers, traced = itertools.count(), list[int]()

    def complete(system, params, prompts, *, names, **options):
        traced.append(tracemalloc.get_traced_memory()[0])
        return [Completion(f"{next(numbers):0{SIZE}}", (1,), "end") for _ in names]

    monkeypatch.setattr(System, "complete", complete)
    Image.new("L", (300, 300), 9).save(tmp_path / "large.png")
    for count in (FEW, MANY):  # the first one makes what is made once
        rows = [{**row, "image": f"{tmp_path}/large.png"} for row in records(count)]
        path = write(tmp_path / f"asked{count}.jsonl", rows)
        config = config_of(folder, data__evaluation_path=path, stages__tuning__steps=4)
        answer, file = answered(config, epath.Path(tmp_path) / f"work{count}")
        traced.clear()
        tracemalloc.start()
        try:
            answer()
        finally:
            tracemalloc.stop()
        assert [len(line["text"]) for line in read_lines(file)] == [SIZE] * count
    assert len(traced) >= MANY // 4 and max(traced) - traced[0] < KEPT < (MANY - FEW) * SIZE

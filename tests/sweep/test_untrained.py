"""A sweep of a release: candidates that train nothing beside one that is trained, interrupted, failing and resumed."""

import collections
import io
import json

import pytest
import rich.console
from ml_collections import ConfigDict

import vlm_jax
from configs import finetune
from tests.train.conftest import tiny_config
from vlm_jax.config import ConfigError
from vlm_jax.generation.sampling import GenerationError
from vlm_jax.sweep import run as sweep_run
from vlm_jax.sweep.points import list_points
from vlm_jax.sweep.run import Sweep

from .conftest import ASKED
from .releases import MAX_NEW_TOKENS, VISUAL_TOKENS, conversation


def sweep_config(release, questions) -> ConfigDict:
    config = ConfigDict({"base": finetune.get_config()})
    base = config.base
    with base.unlocked():
        base.release, base.dtype = str(release), "float32"
        base.row.update({"length": 80, "images": 1})
        base.data.update({"train_path": str(questions), "evaluation_path": str(questions.parent / "evaluation.jsonl")})
        base.evaluation.update({"batch_size": 5, "max_new_tokens": MAX_NEW_TOKENS})
        base.stages.instruction.update({"steps": 1, "batch_size": 1, "warmup_steps": 0})
        base.mesh.update({"data": 1, "fsdp": 1})
    config.candidates = ConfigDict(
        {
            "none": {"budgets": (None,), "schedule": ()},
            "fastv": {"budgets": (4,), "reducer": {"kind": "fastv"}, "schedule": ()},
            "pool": {"budgets": (4,), "connector": {"kind": "pool"}},
        }
    )
    config.sweep = ConfigDict({"seeds": (0,)})
    return config


@pytest.fixture(scope="module")
def swept(released, one_device, tmp_path_factory):
    """(workdir, labels evaluated in each of three calls, `failed` of each): interrupted, with a failure, and whole."""
    (release, questions, _), workdir = released, tmp_path_factory.mktemp("swept") / "sweep"
    (questions.parent / "evaluation.jsonl").write_text(questions.read_text())
    calls, failed, real = collections.defaultdict(list), [], sweep_run.answer_all

    def answer_all(experiment, *arguments):
        reducer, connector = experiment.system.model.reducer, experiment.system.model.connector
        kind = reducer.kind if reducer is not None else connector.kind
        calls[len(failed)].append(kind)
        if len(failed) == 0 and kind == "mlp":
            raise KeyboardInterrupt
        if len(failed) == 1 and kind == "mlp":
            raise GenerationError("the logits are NaN")
        return real(experiment, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_run, "make_mesh", lambda settings: one_device)
        patch.setattr(sweep_run, "answer_all", answer_all)
        for number in range(3):
            console = rich.console.Console(file=io.StringIO(), width=200)
            sweep = Sweep(sweep_config(release, questions), workdir, config_path="configs/tiny.py", console=console)
            if number == 0:
                with pytest.raises(KeyboardInterrupt):
                    sweep.run()
            else:
                sweep.run()
            failed.append(sweep.failed)
    return workdir, dict(calls), failed


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it(swept):
    print(swept)
    for l in lines(swept[0]/"results.jsonl"): print(l)
    assert 0

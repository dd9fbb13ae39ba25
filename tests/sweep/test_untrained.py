"""A sweep of a release: candidates that train nothing beside one that is trained, interrupted, failing and resumed."""

import dataclasses
import io
import json
import pathlib

import pytest
import rich.console
from ml_collections import ConfigDict

import vlm_jax
from configs import finetune
from tests.train.conftest import tiny_config
from vlm_jax.config import ConfigError
from vlm_jax.generation.sampling import GenerationError
from vlm_jax.sweep import point_run
from vlm_jax.sweep import points as points_module
from vlm_jax.sweep.costs import Costs
from vlm_jax.sweep.points import list_points
from vlm_jax.sweep.run import Sweep

from .conftest import ASKED
from .releases import MAX_NEW_TOKENS, VISUAL_TOKENS, conversation


def sweep_config(release, questions) -> ConfigDict:
    config = ConfigDict({"base": finetune.get_config()})
    base = config.base
    with base.unlocked():
        base.release, base.dtype = str(release), "float32"
        base.row.update({"length": 256, "images": 1})
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
    config.sweep = ConfigDict()
    return config


@dataclasses.dataclass(frozen=True)
class Swept:
    """A sweep whose second point failed and whose last was interrupted, and which was then called again.

    Attributes:
      workdir: its folder.
      evaluated: candidates that each call began to evaluate.
      loaded: how often each call read the release for points that train nothing.
      failed: what each call said of points that failed; `failed.jsonl` after the first.
      trained: `metrics.jsonl` of the last point after the first call.
    """

    workdir: pathlib.Path
    evaluated: list[list[str]]
    loaded: list[int]
    failed: list
    trained: str


@pytest.fixture(scope="module")
def swept(released, one_device, tmp_path_factory) -> Swept:
    (release, questions, _), workdir = released, tmp_path_factory.mktemp("swept") / "sweep"
    (questions.parent / "evaluation.jsonl").write_text(questions.read_text())
    answers, first_params = point_run.answers, point_run.first_params
    evaluated, loaded, failed = [[], []], [0, 0], []
    call = 0

    def stopped(experiment, *arguments):
        system = experiment.system
        name = "fastv" if system.processor.reduction else "pool" if system.release.drawn else "none"
        evaluated[call].append(name)
        if call == 0 and name != "fastv":
            raise GenerationError("the logits are NaN") if name == "none" else KeyboardInterrupt
        return answers(experiment, *arguments)

    def counted(*arguments, **options):
        loaded[call] += 1
        return first_params(*arguments, **options)

    def sweep():
        console = rich.console.Console(file=io.StringIO(), width=200)
        return Sweep(sweep_config(release, questions), workdir, config_path="configs/tiny.py", console=console)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(point_run, "make_mesh", lambda settings: one_device)
        patch.setattr(point_run, "answers", stopped)
        patch.setattr(point_run, "first_params", counted)
        first = sweep()
        with pytest.raises(KeyboardInterrupt):
            first.run()
        failed += [first.failed, lines(workdir / "failed.jsonl")]
        trained = (workdir / "points" / "pool@4" / "metrics.jsonl").read_text()
        call, second = 1, sweep()
        second.run()
        failed.append(second.failed)
    return Swept(workdir, evaluated, loaded, failed, trained)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_point_that_fails_is_named_and_no_finished_point_is_run_again(swept):
    error = "GenerationError: the logits are NaN"
    assert swept.failed == [{"none@released": error}, [{"label": "none@released", "error": error}], {}]
    assert swept.evaluated == [["fastv", "none", "pool"], ["none", "pool"]]
    assert swept.loaded == [1, 1]  # for both points that train nothing
    results = lines(swept.workdir / "results.jsonl")
    assert sorted(result["label"] for result in results) == ["fastv@4", "none@released", "pool@4"]
    assert (swept.workdir / "failed.jsonl").read_text() == ""
    assert (swept.workdir / "points" / "pool@4" / "metrics.jsonl").read_text() == swept.trained
    assert sorted(path.parent.name for path in swept.workdir.glob("points/*/metrics.jsonl")) == ["pool@4"]


def test_candidates_that_train_nothing_answer_as_the_release_does(released, swept):
    release, questions, answers = released
    reduced = vlm_jax.from_pretrained(release, token_budget=4, reducer="fastv")
    by_hand = [
        reduced.generate(conversation(turn), [questions.parent / f"{record}.png"], max_new_tokens=MAX_NEW_TOKENS)
        for record, turn in ASKED
    ]
    references = [answer.text or "x" for answer in answers[:4]] + ["?!"]
    results = {result["label"]: result for result in lines(swept.workdir / "results.jsonl")}
    for label, expected in (("none@released", answers), ("fastv@4", by_hand)):
        found = lines(swept.workdir / "points" / label / "answers.jsonl")
        assert [line["text"] for line in found] == [answer.text for answer in expected]
        right = [
            answer.reason == "end" and answer.text.strip() == reference.strip()
            for answer, reference in zip(expected, references, strict=True)
        ]
        assert [line["correct"] for line in found] == right
        assert results[label]["accuracy"]["vqa"]["mean"] == sum(right) / 5
        assert {results[label]["num_visual_tokens"]} == {answer.visual_tokens[-1] for answer in expected}
    assert results["none@released"]["accuracy"]["vqa"]["mean"] > 0


def test_costs_of_candidates_of_a_release(released, swept):
    results = {result["label"]: result for result in lines(swept.workdir / "results.jsonl")}
    whole, dropped, pooled = (results[label] for label in ("none@released", "fastv@4", "pool@4"))
    assert whole["mean_visual_tokens"] == whole["num_visual_tokens"] == VISUAL_TOKENS
    assert dropped["mean_visual_tokens"] == (2 * VISUAL_TOKENS + 4) / 3  # dropped before the last of three layers
    assert dropped["realised_visual_tokens"] == {"mean": VISUAL_TOKENS, "max": VISUAL_TOKENS}
    assert pooled["mean_visual_tokens"] == pooled["num_visual_tokens"] == 4
    assert whole["flops"]["connector"] == 2 * VISUAL_TOKENS * (32 * 64 + 64 * 64)
    prompt = vlm_jax.from_pretrained(released[0]).processor(conversation(0), [released[1].parent / "0.png"])
    for result, length in ((whole, prompt.tokens.shape[1]), (pooled, prompt.tokens.shape[1] - VISUAL_TOKENS + 4)):
        layer = length * 2 * (4 * 64 * 64 + 3 * 64 * 112) + 4 * length * length * 64
        assert result["flops"]["prefill"] == 3 * layer + 2 * 64 * 140  # logits of the last position
    assert whole["step_seconds"] is whole["peak_bytes"] is None and pooled["step_seconds"] > 0
    page = (swept.workdir / "report.html").read_text()
    assert all(f'data-point="{label}"' in page for label in results)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ({"budgets": (4,), "schedule": ()}, r"other: .* its connector and decoder and encoder would be drawn"),
        ({"budgets": (4,), "schedule": ("anwering",)}, r"other\.schedule\.anwering: .*did you mean 'answering'"),
    ],
)
def test_a_candidate_that_nothing_has_trained_is_refused(candidate, message):
    config = ConfigDict({"base": tiny_config(), "candidates": {"other": candidate}, "sweep": {}})
    with pytest.raises(ConfigError, match=message):
        list_points(config)


def test_a_candidate_has_the_connector_that_shared_stages_train_unless_it_has_its_own(monkeypatch):
    monkeypatch.setattr(points_module, "costs", lambda experiment, sample: Costs(experiment.budget.left, 0.0, {}, {}))
    candidates = {
        "pool": {"budgets": (1,), "connector": {"kind": "pool"}, "schedule": ("answering",)},
        "random": {"budgets": (2,), "reducer": {"kind": "random"}},
    }
    sweep = {"shared": ("seeing", "answering")}
    config = ConfigDict({"base": tiny_config(), "candidates": candidates, "sweep": sweep})
    config.base.connector.kind, config.base.token_budget = "mlp", 16
    first, second = list_points(config)
    assert (first.label, first.start, first.config.schedule) == ("random@2", ("encoder", "decoder", "connector"), ())
    assert (second.label, second.start, second.config.schedule) == ("pool@1", ("encoder", "decoder"), ("answering",))
    config.candidates.pool.schedule = ()
    with pytest.raises(ConfigError, match=r"candidates\.pool: .* its connector would be drawn and never trained"):
        list_points(config)

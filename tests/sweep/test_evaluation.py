"""An evaluation of a tiny release: its points, files and numbers, and what a stop, a failure and an error leave."""

import io
import json
import re
import shutil
import sys

import pytest
import rich.console
import safetensors.numpy
from etils import epath

import vlm_jax
from vlm_jax.config import ConfigError
from vlm_jax.evals.intervals import wilson_interval
from vlm_jax.generation.sampling import GenerationError
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.loader import open_system
from vlm_jax.processors.chat import ChatTemplateError
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.processors.video import RateSampler
from vlm_jax.sweep.evaluation import Evaluation, ReleaseEvaluation
from vlm_jax.sweep.executor import LocalExecutor
from vlm_jax.sweep.failures import summary
from vlm_jax.sweep.frontier import REQUIRED
from vlm_jax.sweep.questions import Questions
from vlm_jax.sweep.release_points import ReleasePoint
from vlm_jax.system import System

from ..advice import tried
from .releases import MAX_NEW_TOKENS, VISUAL_TOKENS, conversation


@pytest.fixture(scope="module")
def evaluation(released):
    def make(workdir, console=None, executor=None, **changes):
        settings = {"reducers": ("none", "fastv", "pool"), "budgets": (4,), "batch_size": 2}
        settings |= {"max_new_tokens": MAX_NEW_TOKENS, **changes}
        console = rich.console.Console(file=console or io.StringIO(), width=200)
        settings = ReleaseEvaluation(str(released[0]), str(released[1]), **settings)
        return Evaluation(settings, workdir, console=console, executor=executor)

    return make


@pytest.fixture(scope="module")
def finished(evaluation, tmp_path_factory):
    """(workdir of an evaluation that nothing stopped, what was said)."""
    workdir, said = tmp_path_factory.mktemp("finished") / "work", io.StringIO()
    assert evaluation(workdir, said).run() == {}
    return workdir, said.getvalue()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_of(workdir, label):
    return (workdir / "points" / label / "answers.jsonl").read_text()


def test_points_that_cannot_be_met_are_named_and_the_others_go_on(finished):
    workdir, said = finished
    assert "none@4: skipped: release.token_budget: an image takes at least 36 visual tokens" in said
    assert "pool: skipped: a connector, whose parameters would be random; train it" in said
    found = lines(workdir / "results.jsonl")
    assert [line["label"] for line in found] == ["none@released", "fastv@4"]
    assert [line["connector"] for line in found] == ["none", "fastv"]
    assert all(line.keys() >= REQUIRED for line in found)  # a sweep's lines, which `cli.plan --join` reads


def test_answers_are_those_of_the_release_to_each_question_alone(released, finished):
    found, answers = lines(finished[0] / "points" / "none@released" / "answers.jsonl"), released[2]
    ids = [f"{released[1]}:{name}" for name in ("0", "1#1", "1#2", "2", "3")]
    assert [line["sample_id"] for line in found] == ids
    assert [line["text"] for line in found] == [answer.text for answer in answers]
    right = [bool(answer.text) and answer.reason == "end" for answer in answers[:4]] + [False]
    assert [line["correct"] for line in found] == right and any(right)
    low, high = wilson_interval(sum(right), 5)
    result = lines(finished[0] / "results.jsonl")[0]
    assert result["accuracy"] == {"vqa": {"mean": sum(right) / 5, "low": low, "high": high, "n": 5}}


def test_answers_on_several_devices_are_those_of_one(evaluation, finished, tmp_path):
    assert evaluation(tmp_path / "work", mesh="tensor:2,fsdp:2", batch_size=3).run() == {}
    for label in ("none@released", "fastv@4"):
        assert answers_of(tmp_path / "work", label) == answers_of(finished[0], label)
    assert "--mesh=tensor:2,fsdp:2" in lines(tmp_path / "work" / "results.jsonl")[0]["command"].split()


class Elsewhere(LocalExecutor):
    """An executor whose tasks would have other devices than this process."""

    in_process = False


def test_the_mesh_is_of_the_devices_where_points_run(evaluation, tmp_path):
    evaluated = evaluation(tmp_path / "work", mesh="tensor:16", executor=Elsewhere())
    assert [point.label for point in evaluated.points] == ["none@released", "fastv@4"]
    for mesh, message in (("tensor:16", "is not the number of devices, 8"), ("tensr:2", "did you mean 'tensor'?")):
        with pytest.raises(ConfigError, match="--mesh") as error:
            evaluation(tmp_path / "work", mesh=mesh)
        assert message in str(error.value)
    assert not (tmp_path / "work").exists()


def test_answers_behind_a_drop_are_those_of_prompts_without_padding(released, finished):
    model = vlm_jax.from_pretrained(released[0], token_budget=4, reducer="fastv")
    images = [released[1].parent / "0.png"]
    length = model.processor(conversation(0), images).tokens.shape[1]
    alone = model.generate(conversation(0), images, max_new_tokens=MAX_NEW_TOKENS, buckets=(length,))
    assert lines(finished[0] / "points" / "fastv@4" / "answers.jsonl")[0]["text"] == alone.text


def test_costs_of_points(released, finished):
    whole, dropped = lines(finished[0] / "results.jsonl")
    assert whole["num_visual_tokens"] == VISUAL_TOKENS and dropped["num_visual_tokens"] == 4
    for result in (whole, dropped):  # FastV drops inside the decoder, which all tokens enter
        assert result["realised_visual_tokens"] == {"mean": VISUAL_TOKENS, "max": VISUAL_TOKENS}
        assert result["seconds_per_sample"] > 0
    tensors = safetensors.numpy.load_file(released[0] / "model.safetensors")
    connector = sum(tensor.size for name, tensor in tensors.items() if "mm_projector" in name)
    decoder = sum(t.size for name, t in tensors.items() if "mm_projector" not in name and "vision_tower" not in name)
    assert whole["num_params"] == dropped["num_params"]
    assert (whole["num_params"]["connector"], whole["num_params"]["decoder"]) == (connector, decoder)
    assert whole["flops"]["connector"] == 2 * VISUAL_TOKENS * (32 * 64 + 64 * 64)
    images = [released[1].parent / "0.png"]
    length = vlm_jax.from_pretrained(released[0]).processor(conversation(0), images).tokens.shape[1]
    layer = length * 2 * (4 * 64 * 64 + 3 * 64 * 112) + 4 * length * length * 64
    assert whole["flops"]["prefill"] == 3 * layer + 2 * 64 * 140  # logits of the last position
    words = dropped["command"].split()
    assert words[:3] == ["python", "-m", "vlm_jax.cli.evaluate"]
    assert {"--reducers=fastv", "--budgets=4", "--workdir=workdir/fastv@4"} <= set(words)


def test_the_frontier_and_the_report_show_every_point(finished):
    assert (finished[0] / "frontier.png").read_bytes().startswith(b"\x89PNG")
    page = (finished[0] / "report.html").read_text()
    assert 'data-point="none@released"' in page and 'data-point="fastv@4"' in page
    assert '<option value="seconds_per_sample">' in page and '<option value="step_seconds">' not in page
    kept = json.loads((finished[0] / "retained.json").read_text())
    whole, dropped = (line["accuracy"]["vqa"]["mean"] for line in lines(finished[0] / "results.jsonl"))
    means = [point["overall"]["share"]["mean"] for point in kept["points"]]
    assert kept["full"] == "none@released" and means == pytest.approx([100, 100 * dropped / whole])
    assert '<section id="retained">' in page and f"{finished[0] / 'retained.json'}\n" in finished[1]


def test_a_stopped_point_goes_on_behind_its_last_whole_line(evaluation, finished, tmp_path, monkeypatch):
    real, calls = System.answer, []

    def stopped(system, *arguments, **options):
        calls.append(options["names"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(system, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(System, "answer", stopped)
        evaluation(tmp_path / "work").run()
    path = tmp_path / "work" / "points" / "none@released" / "answers.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + second[:20])
    assert evaluation(tmp_path / "work").run() == {}
    for label in ("none@released", "fastv@4"):
        assert answers_of(tmp_path / "work", label) == answers_of(finished[0], label)
    found, expected = (lines(folder / "results.jsonl") for folder in (tmp_path / "work", finished[0]))
    for result in found + expected:
        del result["seconds_per_sample"]
    assert found == expected
    with pytest.raises(ConfigError, match=r"was created with another config.*\n.*config\.batch_size: 2 here, 3 there"):
        evaluation(tmp_path / "work", batch_size=3)


def test_a_point_that_fails_is_named_and_tried_again(evaluation, finished, tmp_path, monkeypatch):
    real = System.answer

    def failing(system, *arguments, **options):
        if system.processor.reduction is None:
            return real(system, *arguments, **options)
        raise GenerationError("the logits are NaN")

    failed = {"fastv@4": "GenerationError: the logits are NaN"}
    with monkeypatch.context() as patch:
        patch.setattr(System, "answer", failing)
        assert evaluation(tmp_path / "work", reducers=("fastv", "none")).run() == failed
    assert lines(tmp_path / "work" / "failed.jsonl") == [{"label": "fastv@4", "error": failed["fastv@4"]}]
    assert [line["label"] for line in lines(tmp_path / "work" / "results.jsonl")] == ["none@released"]
    advised = tried("{1} of {2} points failed: {fastv@4}; see {}. The same command tries them again")
    assert re.search(advised, summary(failed, 2, epath.Path(tmp_path)))
    assert evaluation(tmp_path / "work", reducers=("fastv", "none")).run() == {}
    assert (tmp_path / "work" / "failed.jsonl").read_text() == ""
    assert answers_of(tmp_path / "work", "fastv@4") == answers_of(finished[0], "fastv@4")


def test_metrics_can_be_chosen_and_all_their_values_are_in_the_results(evaluation, finished, tmp_path):
    assert evaluation(tmp_path / "work", reducers=("none",), metrics=("vqa=characters",)).run() == {}
    (found,), whole = lines(tmp_path / "work" / "results.jsonl"), lines(finished[0] / "results.jsonl")[0]
    answers = [
        lines(folder / "points" / "none@released" / "answers.jsonl") for folder in (tmp_path / "work", finished[0])
    ]
    assert [line["text"] for line in answers[0]] == [line["text"] for line in answers[1]]
    scores = [line["correct"] for line in answers[0]]
    assert found["accuracy"]["vqa"]["mean"] == pytest.approx(sum(scores) / 5)
    assert set(found["scores"]["vqa"]) == {"mean", "character_error_rate", "word_error_rate"}
    assert found["scores"]["vqa"]["mean"]["mean"] == pytest.approx(sum(scores) / 5)
    assert whole["scores"] == {"vqa": {"mean": whole["scores"]["vqa"]["mean"]}}
    assert whole["scores"]["vqa"]["mean"]["mean"] == pytest.approx(whole["accuracy"]["vqa"]["mean"])
    assert "--metrics=vqa=characters" in found["command"] and "--metrics" not in whole["command"]
    for given, message in (("vqa", "expected task=metric"), ("vqa=f2", "task 'vqa': there is no metric 'f2'")):
        with pytest.raises(ConfigError, match=f"--metrics: {message}"):
            evaluation(tmp_path / "other", metrics=(given,))


def test_points_are_compared_with_those_of_another_evaluation_or_with_one_point(evaluation, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "work")
    said = io.StringIO()
    assert evaluation(tmp_path / "work", said, compare=str(finished[0])).run() == {}
    found = lines(tmp_path / "work" / "comparison.jsonl")
    assert [line["label"] for line in found] == ["none@released", "fastv@4"]
    assert all(line["ours"] == line["theirs"] and line["p_value"] == 1 for line in found)
    one = finished[0] / "points" / "none@released"
    assert f"none@released against {one}" in said.getvalue()
    assert evaluation(tmp_path / "work", compare=str(one)).run() == {}
    found, results = lines(tmp_path / "work" / "comparison.jsonl"), lines(finished[0] / "results.jsonl")
    assert [line["ours"] for line in found] == [pytest.approx(line["accuracy"]["vqa"]["mean"]) for line in results]
    assert [line["against"] for line in found] == [str(one)] * 2 and found[1]["theirs"] == found[0]["ours"]
    with pytest.raises(ConfigError, match="--compare: expected the workdir of an evaluation, or a point's folder"):
        evaluation(tmp_path / "work", compare=str(tmp_path))


def test_parquet_needs_pyarrow(evaluation, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=tried("pip install 'vlm_jax[parquet]', or omit the flag")):
        evaluation(tmp_path / "work", parquet=True)
    assert evaluation(tmp_path / "work").points


def test_more_answers_than_questions_need_another_workdir(evaluation, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "work")
    written, whole = (
        folder / "points" / "none@released" / "answers.jsonl" for folder in (tmp_path / "work", finished[0])
    )
    written.write_text(whole.read_text() + whole.read_text().splitlines()[0] + "\n")
    results = (tmp_path / "work" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "work" / "results.jsonl").write_text(results[1])  # without those of none@released
    found = evaluation(tmp_path / "work").run()
    assert re.search(tried("has {6} answers to {5} questions; use another workdir"), found["none@released"])
    assert evaluation(tmp_path / "other", reducers=("none",)).run() == {}
    assert answers_of(tmp_path / "other", "none@released") == whole.read_text()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reducers": ("fastw",)}, ConfigError, "--reducers: no reducer 'fastw'; did you mean 'fastv'"),
        ({"budgets": (0,)}, ConfigError, "--budgets\\[0\\]: expected at least 1, got 0"),
        ({"reducers": ("fastv",), "budgets": ()}, ConfigError, "no point can be evaluated"),
        ({"batch_size": 0}, ConfigError, "--batch_size: expected at least 1, got 0"),
        ({"enable_thinking": False}, ChatTemplateError, "unused variable 'enable_thinking'"),
        ({"max_new_tokens": 1}, SequenceTooLong, "jsonl:0': its reference answer has .* raise --max_new_tokens"),
    ],
)
def test_what_is_refused_before_anything_is_written(evaluation, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        evaluation(tmp_path / "work", **changes)
    assert not (tmp_path / "work").exists()


def test_the_variable_of_the_template_is_a_setting_of_answers(released):
    """An earlier workdir, without it, resumes."""
    system = open_system(released[0], FAMILIES, dtype="float32")
    for enable, words in ((None, []), (False, ["--enable_thinking=False"])):
        settings = ReleaseEvaluation("release", "data", ("none",), enable_thinking=enable)
        assert settings.of_answers.get("enable_thinking") is enable
        assert ("enable_thinking" in settings.of_answers) == (enable is not None)
        command = settings.command("workdir", ReleasePoint("none", None, system))
        assert [word for word in command.split() if "thinking" in word] == words


def test_questions_from_any_number_on_and_of_drawn_records(released):
    questions = Questions(str(released[1]), 3, RateSampler())
    whole = [sample.sample_id for sample in questions.start_at(0)]
    assert len(questions) == len(whole) == 5
    for start in range(6):
        assert [sample.sample_id for sample in questions.start_at(start)] == whole[start:]
    drawn = Questions(str(released[1]), 3, RateSampler(), num_samples=2)
    of_records = {sample.sample_id.split(":")[-1].split("#")[0] for sample in drawn.start_at(0)}
    assert len(of_records) == 2 and {sample.sample_id for sample in drawn.start_at(0)} <= set(whole)

"""Questions without a browser: answers equal those of `cli.generate`, what was kept, and bad input."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.advice import tried
from tests.contracts.releases import make
from tests.demo import scripted
from tests.processes.alphabet import write
from vlm_jax import from_pretrained
from vlm_jax.config import ConfigError
from vlm_jax.demo.answer import Answer
from vlm_jax.demo.choices import Choices
from vlm_jax.demo.comparison import comparison
from vlm_jax.demo.kept import kept_boxes, kept_tokens
from vlm_jax.demo.trial import Trial, TrialError, caption
from vlm_jax.generation.text import Completion
from vlm_jax.layers.mesh_axes import active_mesh
from vlm_jax.models.vlm import VLM
from vlm_jax.processors.mosaic import Mosaic, MosaicViews
from vlm_jax.processors.pixels import Pixels
from vlm_jax.serve.service import ServeSettings
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.system import UnsupportedError

QUESTION = "What does the sign say?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def trial(model):
    settings = ServeSettings(max_batch=1, num_batches=1, batch_wait=0.0, max_new_tokens=6, max_pixels=400_000)
    made = Trial("llava", model, settings)
    yield made
    made.service.batcher.stop()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "street.png"
    scripted.street().save(path)
    return path


def message():
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]


@pytest.mark.parametrize(("reducer", "counts"), [("uniform_stride", (4,)), ("fastv", (16, 4))])
def test_answers_are_those_of_generate(trial, model, picture, reducer, counts):
    """`cli.generate` prints what `Pretrained.generate` returns."""
    *_, last = trial.ask(picture, QUESTION, 4, reducer)
    expected = model.with_budget(4, reducer=reducer).generate(message(), [picture], max_new_tokens=6)
    whole = model.generate(message(), [picture], max_new_tokens=6)
    assert (last.budget.text, last.full.text) == (expected.text, whole.text)
    assert last.budget.completion.visual_tokens == expected.visual_tokens == counts
    assert last.full.completion.visual_tokens == (16,) and last.stage == ""
    assert 0 < last.budget.first_seconds <= last.budget.seconds


def test_uniform_stride_keeps_every_fourth_token(model, picture):
    """Of 16 tokens 0, 4, 8, 12: the left column of the 4 x 4 grid.

    The 480 x 360 pixels are resized to 21 x 16; the tile has columns 2 to 18.
    """
    reduced = model.with_budget(4, reducer="uniform_stride")
    batch = reduced.system.processor(message(), [picture])
    assert kept_tokens(reduced.system, model.params, batch).tolist() == [0, 4, 8, 12]
    boxes = kept_boxes(model.system, reduced.system, model.params, batch, (360, 480))
    left, right = 2 * 480 / 21, 6 * 480 / 21
    expected = [(left, top, right, top + 90) for top in (0, 90, 180, 270)]
    np.testing.assert_allclose(boxes, expected, atol=2)


@pytest.mark.parametrize("reducer", ["fastv", "pyramid_drop", "visionzip"])
def test_as_many_tokens_are_kept_as_the_budget_has(model, picture, reducer):
    reduced = model.with_budget(5, reducer=reducer)
    batch = reduced.system.processor(message(), [picture])
    kept = kept_tokens(reduced.system, model.params, batch)
    assert len(set(kept.tolist())) == 5 and set(kept.tolist()) <= set(range(16))


@pytest.mark.parametrize(("reducer", "method"), [("fastv", "hidden"), ("visionzip", "visual_tokens")])
def test_parameters_on_several_devices_keep_the_same_tokens(model, picture, reducer, method, monkeypatch):
    """The mesh is set where the model is traced: kernels of a TPU cannot be partitioned without it."""
    mesh, meshes, original = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2)), [], getattr(VLM, method)

    def noted(*args, **kwargs):
        meshes.append(active_mesh())
        return original(*args, **kwargs)

    reduced, shared = model.with_budget(5, reducer=reducer), from_pretrained(model.folder, mesh=mesh)
    batch = reduced.system.processor(message(), [picture])
    expected = kept_tokens(reduced.system, model.params, batch)
    monkeypatch.setattr(VLM, method, noted)
    assert kept_tokens(reduced.system, shared.params, batch).tolist() == expected.tolist()
    assert meshes == [mesh.abstract_mesh]


def test_what_is_not_drawn_is_not_said_to_be_kept():
    """Of a picture with tiles of another size than the whole no part is outlined."""
    whole = MosaicViews(Pixels(), 4, (1, 1))
    tiled = dataclasses.replace(whole, mosaic=Mosaic(2, (1, 1)))
    assert caption("divprune", False, tiled).startswith("What divprune kept is not drawn")
    assert caption("divprune", False, whole) == "divprune drops no part of the picture as a whole"
    unordered = dataclasses.replace(whole, newlines=False)
    assert "not at places of the picture" in caption("divprune", False, unordered)
    assert caption("divprune", True, whole).startswith("divprune kept the outlined parts")
    assert caption("none", False, tiled) == "All parts of the picture were used"


def test_bad_input_has_a_message(trial, picture, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    Image.new("RGB", (1000, 500)).save(tmp_path / "huge.png")
    for source, text, tokens, reducer, told in (
        (None, QUESTION, 4, "random", tried("There is no picture yet: choose one, or drop it on the page.")),
        (picture, "  ", 4, "random", tried("There is no question yet: write one.")),
        (tmp_path / "a.png", QUESTION, 4, "random", "unknown image format"),
        (tmp_path / "huge.png", QUESTION, 4, "random", "500x1000 pixels, more than max_pixels=400000"),
        (picture, QUESTION, 17, "random", "[Tt]oken.budget"),
        (picture, QUESTION, 5, "none", "[Tt]oken.budget"),
    ):
        with pytest.raises(TrialError, match=told):
            list(trial.ask(source, text, tokens, reducer))
    assert list(trial.ask(picture, QUESTION, 4, "random"))[-1].full.completion.tokens


def test_an_answer_that_takes_too_long_has_a_message(model, picture, trial):
    late = Trial("llava", model, ServeSettings(max_batch=1, num_batches=1, max_new_tokens=6, request_seconds=1e-9))
    told = tried("The model did not answer within {1e-09} seconds; raise --answer_seconds")
    try:
        with pytest.raises(TrialError, match=told):
            list(late.ask(picture, QUESTION, 4, "random"))
    finally:
        late.service.batcher.stop()
    assert trial.service.settings.request_seconds == 600.0
    assert list(trial.ask(picture, QUESTION, 4, "random"))[-1].stage == ""


def test_pairs_of_budget_and_reducer_are_limited(model, picture):
    """The full budget is one of them."""
    settings = ServeSettings(max_batch=1, num_batches=1, max_new_tokens=6, max_budgets=2)
    few, more = (Trial("llava", model, dataclasses.replace(settings, max_budgets=most)) for most in (2, 3))
    told = tried("All {2} pairs of budget and reducer are taken; choose an earlier one, or raise --max_budgets")
    try:
        assert list(few.ask(picture, QUESTION, 4, "random"))[-1].stage == ""
        with pytest.raises(TrialError, match=told):
            list(few.ask(picture, QUESTION, 5, "random"))
        assert list(few.ask(picture, QUESTION, 4, "random"))[-1].stage == ""
        for tokens in (4, 5):
            assert list(more.ask(picture, QUESTION, tokens, "random"))[-1].stage == ""
    finally:
        for one in (few, more):
            one.service.batcher.stop()


def test_a_question_that_is_left_is_cancelled(trial, picture, monkeypatch):
    jobs, submit = [], trial.service.batcher.submit
    monkeypatch.setattr(trial.service.batcher, "submit", lambda job: submit(jobs.append(job) or job))
    asked = trial.ask(picture, QUESTION, 4, "random")
    while not next(asked).budget.text:
        pass
    assert [job.is_cancelled() for job in jobs] == [False]
    asked.close()
    assert [job.is_cancelled() for job in jobs] == [True]


def test_a_release_without_pictures_is_refused(tmp_path, model):
    write(tmp_path)
    with pytest.raises(UnsupportedError, match=tried("a language model without an encoder; pass a vision-language")):
        Choices(from_pretrained(tmp_path))
    assert "visionzip" in Choices(model).reducers


def test_a_reducer_that_does_not_suit_the_release_is_refused(model):
    choices = Choices(model)
    with pytest.raises(ConfigError, match="--reducer: no kind 'fastw'; did you mean 'fastv'"):
        choices.initial_reducer("fastw")
    vars(choices)["reducers"] = ("none", "random")
    with pytest.raises(ConfigError, match=tried("does not suit this release; choose one of {none, random}")):
        choices.initial_reducer("visionzip")
    assert choices.initial_reducer("none") == "none" and choices.initial_reducer() == "random"


def test_the_table_has_ratios_of_tokens_and_seconds():
    done, whole = Completion("a", (1, 2, 3), "end", (16, 4)), Completion("b", (1,) * 5, "end", (16,))
    budget, full = Answer("a", done, 0.5, 1.0), Answer("b", whole, 1.0, 4.0)
    assert comparison(budget, full) == [
        ("Visual tokens", "16 → 4", "16", "4 ×"),
        ("Seconds to the first text", "0.5", "1", "2 ×"),
        ("Seconds in all", "1", "4", "4 ×"),
        ("Tokens of the answer", "3", "5", ""),
    ]

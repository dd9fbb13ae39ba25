"""Reducers that choose by the question: the rule against its definition, and a release with the CLIP of its tower."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from tests.contracts.releases import CLIP, clip_config, make, write_clip
from tests.train.conftest import tiny_config
from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.data.loader import join
from vlm_jax.models.vlm import flat_images, flat_question
from vlm_jax.plugins import PluginError
from vlm_jax.pretrained.guide import clip_guide
from vlm_jax.processors.layout import SequenceTooLong
from vlm_jax.processors.learned import PromptError
from vlm_jax.reducers import REDUCERS, cdpruner
from vlm_jax.reducers.cdpruner import CDPruner
from vlm_jax.reducers.reducer import KeepsFeatures
from vlm_jax.reducers.trim import TRIM
from vlm_jax.sweep.release_run import ReleaseEvaluation, ReleaseRunner
from vlm_jax.types import Guidance, RowShape, VisualFeatures

from ..advice import tried
from . import definitions

COUNT, KEPT, LENGTH = 12, 5, 8


def guided(rng, real):
    """Three images, of which `real` features are real, and questions of one to three segments."""
    mask = rng.permuted(np.arange(COUNT)[None] < np.asarray(real)[:, None], axis=1)
    segments = np.arange(3)[None] < np.array([[1], [2], [3]])

    def draw(*shape):
        return jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32)

    return VisualFeatures(
        draw(COUNT, 7),
        jnp.asarray(mask),
        (1, COUNT),
        guidance=Guidance(draw(COUNT, 6), draw(3, 6), jnp.asarray(segments)),
    )


@pytest.mark.parametrize("real", [(12, 12, 12), (12, 8, 6)], ids=str)
def test_what_is_left_is_what_the_papers_say(real):
    found = guided(np.random.default_rng(3), real)
    out = jax.jit(lambda f: CDPruner(KEPT).apply({}, f, deterministic=True))(found)
    mean = jax.jit(lambda f: TRIM(KEPT).apply({}, f, deterministic=True))(found)
    for b in range(3):
        own = np.flatnonzero(found.mask[b])
        text = np.float64(found.guidance.text[b])[np.asarray(found.guidance.mask[b])]
        image = np.float64(found.guidance.image[b])[own]
        expected = definitions.cdpruner(np.float64(found.tokens[b])[own], image, text, KEPT)
        np.testing.assert_array_equal(out.kept[b], own[expected])
        np.testing.assert_array_equal(out.tokens[b], found.tokens[b][own[expected]])
        merged = definitions.trim(np.float64(found.tokens[b])[own], image, text, KEPT)
        np.testing.assert_array_equal(mean.kept[b], own[sorted(merged)])
        np.testing.assert_allclose(mean.tokens[b], [merged[i] for i in sorted(merged)], atol=1e-5)
    assert out.mask.all() and mean.mask.all()


def test_trim_as_released_ranks_by_products_and_ends_with_the_mean():
    """Of ten features int(10 * 0.25) stay; a long embedding is less like the question than a short opposite one."""
    image = jnp.asarray([[1.0, 0], [-1, 0], [-9, 9], [0, 1], *[[2, 0]] * 6])[None]
    guidance = Guidance(image, jnp.asarray([[[3.0, 0.0]]]), jnp.ones((1, 1), bool))
    tokens = jnp.arange(10.0).reshape(1, 10, 1)
    features = VisualFeatures(tokens, jnp.ones((1, 10), bool), (1, 10), guidance=guidance)
    reducer = TRIM(1, ratio=0.25, rule="as_released")
    left = jax.jit(lambda f: reducer.apply({}, f, deterministic=True))(features)
    assert reducer.num_left(10) == 3
    np.testing.assert_allclose(left.tokens[0, :, 0], [1, 2, (45 - 3) / 8])


def test_where_the_kept_ones_span_all_the_most_relevant_follow():
    """Tokens on two axes: after one of each, nothing is left but relevance."""
    tokens = jnp.tile(jnp.eye(2), (4, 1))[None]
    cosines = jnp.asarray([0.1, 0.9, 0.3, -0.5, 0.7, -0.2, -0.9, 0.5])
    image = jnp.stack([cosines, jnp.sqrt(1 - cosines**2)], axis=-1)[None]
    guidance = Guidance(image, jnp.asarray([[[1.0, 0.0]]]), jnp.ones((1, 1), bool))
    features = VisualFeatures(tokens, jnp.ones((1, 8), bool), (1, 8), guidance=guidance)
    left = jax.jit(lambda f: CDPruner(4).apply({}, f, deterministic=True))(features)
    # Relevance falls with the cosine: 6 and 3 are the best of their axes, 5 and 0 the best of the others.
    np.testing.assert_array_equal(left.kept, [[0, 3, 5, 6]])


def test_as_released_a_kernel_of_too_low_a_rank_leaves_fewer(monkeypatch):
    """Of rank 1: the second choice divides 0 by 0, and NaN is the largest, so that the first one is chosen again."""
    relevance = np.array([2.0, 1, 1, 1])
    monkeypatch.setattr(cdpruner, "conditional_kernel", lambda *_: jnp.asarray(np.outer(relevance, relevance))[None])
    found = guided(np.random.default_rng(0), (COUNT,) * 3)
    found = jax.tree.map(lambda leaf: leaf[:1, :4] if leaf.shape[1] == COUNT else leaf[:1], found)
    found = dataclasses.replace(found, grid=(1, 4))
    left = CDPruner(3, rule="as_released").apply({}, found, deterministic=True)
    np.testing.assert_array_equal(left.mask, [[True, True, False]])
    np.testing.assert_array_equal(left.kept[0, :2], [0, 1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A LLaVA, and a CLIP whose image tower has the shape of LLaVA's."""
    release, whole = tmp_path_factory.mktemp("llava"), tmp_path_factory.mktemp("clip")
    model = make("llava", release)
    write_clip(whole, clip_config(CLIP, LENGTH))
    return model, release, whole


def asked(*questions):
    """A conversation of several questions about one picture, the last of them without an answer."""
    messages = []
    for number, question in enumerate(questions):
        image = [{"type": "image"}] * (not number)
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        if number < len(questions) - 1:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": "yes"}]})
    return messages


def test_the_question_that_is_set_chooses_and_no_other_row_matters(folders):
    model, _, whole = folders
    picture = np.random.default_rng(1).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    chosen = {}
    single = [asked("a red dog"), asked("Where?")]  # two segments of the text tower, and one
    both = asked("a red dog", "Where?")
    for which in ("first", "last"):
        reduced = model.with_budget(KEPT, reducer={"kind": "cdpruner", "text_model": str(whole), "question": which})
        batch = reduced.processor.batch([*single, both], [[picture]] * 3)
        assert (batch.visual_index >= 0).sum(1).tolist() == [KEPT] * 3

        def kept(params, batch, module=reduced.module):
            args = (flat_images(batch.images), None, flat_question(batch))
            return module.apply({"params": params}, *args, method="visual_tokens").kept

        chosen[which] = np.asarray(jax.jit(kept)(reduced.params, batch))
        if which == "first":
            logits = jax.jit(reduced.module.apply)({"params": reduced.params}, batch)
            alone = jax.tree.map(lambda leaf: leaf[1:2], batch)
            one = jax.jit(reduced.module.apply)({"params": reduced.params}, alone)
            np.testing.assert_allclose(one[0], logits[1], atol=1e-5)
    dog, where = chosen["first"][:2]
    assert dog.tolist() != where.tolist()
    np.testing.assert_array_equal(chosen["first"][2], dog)
    np.testing.assert_array_equal(chosen["last"], [dog, where, where])


def guided_processor(folders, **fields):
    model, _, whole = folders
    return model.with_budget(KEPT, reducer={"kind": "cdpruner", "text_model": str(whole), **fields}).processor


def ids_of(question):
    """Of the tower's tokenizer, whose tokens are bytes: those of printable characters first, from 33 on."""
    return [256, *(byte - 33 if byte > 32 else 188 + byte for byte in question.encode()), 257]


ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
PICTURE = np.zeros((16, 16, 3), np.uint8)


def test_training_rows_with_questions_of_different_length_join(folders):
    learned = [[*asked(question), ANSWER] for question in ("a red dog", "Where?")]
    shape = RowShape(60, 1)

    def row(processor, messages):
        example = processor.example(messages, [PICTURE], targets=True)
        return processor.rows([[example]], shape, targets=True)

    two = guided_processor(folders, segments=2)
    question = join([row(two, messages) for messages in learned]).question
    assert question.mask.tolist() == [[[True, True]], [[True, False]]]
    for text, tokens in zip(("a red dog", "Where?"), question.tokens, strict=True):
        ids = ids_of(text)
        np.testing.assert_array_equal(tokens.reshape(-1), ids + [0] * (2 * LENGTH - len(ids)))
    one = guided_processor(folders)
    words = tried("raise segments of the reducer to {2} or more, or shorten the question")
    with pytest.raises(SequenceTooLong, match=words):
        row(one, learned[0])
    with pytest.raises(SequenceTooLong, match=words):  # before training, which plans its rows by it
        one.measure(learned[0], [(16, 16)], targets=True)
    assert row(one, learned[1]).question.tokens.shape == (1, 1, 1, LENGTH)
    assert one.batch(learned, [[PICTURE]] * 2, targets=True).question.tokens.shape == (2, 1, 2, LENGTH)


def test_every_picture_has_the_question_of_its_own_message(folders):
    """The second picture is an item, or a placeholder in a text; a question before it is for pictures before it."""
    marked = [{"role": "user", "content": "<image>\nWhere?"}]
    found = guided_processor(folders).batch(
        [[*asked("Who?"), ANSWER, *second] for second in (asked("Where?"), marked)], [[PICTURE] * 2] * 2
    )
    for tokens in found.question.tokens:
        assert tokens.shape == (2, 1, LENGTH)
        np.testing.assert_array_equal(tokens[0, 0], [*ids_of("Who?"), 0, 0])
        np.testing.assert_array_equal(tokens[1, 0], ids_of("Where?"))


def test_no_answer_is_learned_from_what_a_later_question_chose(folders):
    both = [*asked("Who?", "Where?"), ANSWER]
    first, last = (guided_processor(folders, question=which) for which in ("first", "last"))
    with pytest.raises(PromptError, match=tried("set turns to 'last', or question of the reducer to 'first'")):
        last.batch([both], [[PICTURE]], targets=True)
    chosen = last.batch([both], [[PICTURE]], targets=True, turns="last"), first.batch([both], [[PICTURE]], targets=True)
    for batch, question in zip(chosen, ("Where?", "Who?"), strict=True):
        assert batch.question.tokens[0, 0, 0].tolist()[: len(question) + 2] == ids_of(question)


def test_the_guide_is_read_from_the_clip_and_not_written_with_the_release(folders, tmp_path):
    model, folder, whole = folders
    reduced = model.with_budget(KEPT, reducer={"kind": "cdpruner", "text_model": str(whole)})
    guide, theirs = reduced.params["guide"], vlm_jax.from_pretrained(whole).params
    image = {"image_norm": theirs["image"]["final_norm"], "image_projection": theirs["image"]["projection"]}
    jax.tree.map(np.testing.assert_array_equal, guide, {"text": theirs["text"], **image})
    assert set(reduced.params) == {*model.params, "guide"}
    released = {"mm_vision_tower": f"../{whole.name}"}  # of LLaVA's own config, relative to its folder
    named = clip_guide(model.module.encoder, None, released, folder, kind="cdpruner", path="config.reducer")
    assert named.borrowed.checkpoint.keys() == reduced.system.release.borrowed[0].checkpoint.keys()
    reduced.save_pretrained(tmp_path / "out")
    again = vlm_jax.from_pretrained(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_a_kind_of_another_package_has_a_guide_if_it_says_so(folders, monkeypatch):
    model, _, whole = folders
    monkeypatch.setattr(REDUCERS, "_added", {})
    monkeypatch.setattr(REDUCERS, "_sources", {})
    unset = type("Unset", (KeepsFeatures,), {"kind": "own", "guided_by": "clip"})
    with pytest.raises(PluginError, match="lacks text_model; question; segments;"):
        vlm_jax.register_reducer("own", unset)

    class Own(unset):
        text_model: str | None = None
        question: str = "last"
        segments: int = 2

    vlm_jax.register_reducer("own", Own)
    reduced = model.with_budget(KEPT, reducer={"kind": "own", "text_model": str(whole)})
    assert reduced.module.guide is not None
    batch = reduced.processor.batch([asked("Who?", "Where?")], [[PICTURE]])
    np.testing.assert_array_equal(batch.question.tokens[0, 0, 0], ids_of("Where?"))


def test_an_evaluation_reads_the_guide_once_for_all_its_points(folders):
    model, _, whole = folders
    runner = ReleaseRunner.__new__(ReleaseRunner)
    runner.__dict__ |= {"params": model.params, "_borrowed": {}}
    assert runner.params_of(model.system).keys() == model.params.keys()
    first = runner.params_of(model.with_budget(KEPT, reducer={"kind": "trim", "text_model": str(whole)}).system)
    assert set(first) == {*model.params, "guide"}
    other = model.with_budget(3, reducer={"kind": "cdpruner", "text_model": str(whole)}).system
    assert runner.params_of(other)["guide"] is first["guide"]


def test_an_evaluation_names_the_clip_and_the_question_of_the_points_that_need_them(folders, tmp_path):
    _, folder, whole = folders
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "0", "question": "Who?", "answer": "a"}) + "\n")

    def settings(*reducers, **given):
        return ReleaseEvaluation(str(folder), str(tmp_path / "q.jsonl"), reducers, (KEPT,), **given)

    given = {"text_model": str(whole), "question": "last"}
    runner = ReleaseRunner(settings("random", "cdpruner", **given), tmp_path)
    plain, chosen = runner.points
    assert (chosen.system.model.reducer.text_model, chosen.system.model.reducer.question) == tuple(given.values())
    of_chosen, of_plain = (settings("random", "cdpruner", **given).command("work", one) for one in (chosen, plain))
    assert f"--text_model={whole} --question=last" in of_chosen
    assert "--text_model" not in of_plain and "--question" not in of_plain
    assert settings("cdpruner").of_answers.keys().isdisjoint(given)  # workdirs of before are resumed
    unnamed = ReleaseRunner(settings("random", "cdpruner"), tmp_path)
    assert [point.label for point in unnamed.points] == ["random@5"]
    assert "(--text_model of vlm_jax.cli.evaluate)" in unnamed.refused[0].reason
    words = tried("chooses by the question; add one that does ({}) to --reducers, or leave {--text_model} out")
    with pytest.raises(ConfigError, match=words):
        settings("random", text_model=str(whole))
    assert settings("random").guidance == {} and settings("trim", text_model="a").guidance == {"text_model": "a"}


def test_what_has_no_clip_or_another_one_is_refused(folders, tmp_path):
    model, _, whole = folders

    def reduced(**fields):
        return model.with_budget(KEPT, reducer={"kind": "cdpruner", **fields})

    with pytest.raises(ConfigError, match=tried("set it to its folder or name, such as")):
        reduced()
    config = json.loads((whole / "config.json").read_text())
    for key in ("a", "b"):
        (tmp_path / key).mkdir()
    write_clip(tmp_path / "a", {**config, "vision_config": {**config["vision_config"], "patch_size": 8}})
    words = tried("is not the CLIP of this release's image tower: it has {}; set it to that CLIP, or choose another")
    with pytest.raises(ConfigError, match=words) as refused:
        reduced(text_model=str(tmp_path / "a"))
    assert "patch_size 8 (here 4)" in str(refused.value)
    (tmp_path / "b" / "config.json").write_text(json.dumps(CLIP))
    with pytest.raises(ConfigError, match=tried("got {}; set it to the folder of the whole CLIP")):
        reduced(text_model=str(tmp_path / "b"))
    assert reduced(text_model=str(whole)).module.guide is not None  # what they say


def test_models_without_a_clip_are_refused(folders, tmp_path):
    config = tiny_config().unlock()
    config.reducer.kind = "cdpruner"
    with pytest.raises(ConfigError, match=tried("set config.release to one with a CLIP's tower, or choose another")):
        build(config)
    config.reducer.kind = "random"
    build(config)
    hybrid = make("deepseek_vl_hybrid", tmp_path)
    with pytest.raises(ConfigError, match=tried("choose a release with one CLIP tower, such as LLaVA, or another")):
        hybrid.with_budget(KEPT, reducer={"kind": "cdpruner", "text_model": str(folders[2])})
    assert hybrid.with_budget(KEPT, reducer="random").module.guide is None

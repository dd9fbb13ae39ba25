"""Two towers in the trainer: losses over the whole batch on one device and on eight, a locked tower, a teacher."""

import functools
import os
import signal

import jax
import numpy as np
import pytest
from etils import epath

from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.data.loader import batch_at
from vlm_jax.evals.evaluators import evaluator_of
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.input import rows
from vlm_jax.train.loop import Interrupted, Trainer
from vlm_jax.train.objectives.contrastive import Contrastive
from vlm_jax.train.stages import parse_schedule
from vlm_jax.train.workdir import read_lines

from ..losses.conftest import reference
from .conftest import tiny_config
from .towers import RATES, tiny_towers

LOCKED = {key: rate for key, rate in RATES.items() if key != "image"}
STAGES = {"locked": {"learning_rates": LOCKED}, "both": {"loss": "softmax"}}


def train(config, mesh, workdir, **settings):
    return Trainer(config, build(config), mesh, workdir, **settings).run()


def lines(workdir):
    return read_lines(epath.Path(workdir) / "metrics.jsonl")


@pytest.fixture(scope="module")
def finished(one_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, train(tiny_towers(**STAGES), one_device, workdir)


def first_embeddings(config, mesh, params=None):
    """Embeddings of the first batch of the first stage, before the first step."""
    experiment = build(config)
    (span,) = parse_schedule(tuple(config.schedule[:1]), {config.schedule[0]: config.stages[config.schedule[0]]})
    batch = batch_at(rows(experiment, span.stage, config.seed), 8, 0)
    params = experiment.initial(jax.random.key(config.seed), mesh) if params is None else params
    batch = getattr(batch, "student", batch)
    return jax.jit(experiment.system.model.apply)({"params": params}, *batch.inputs)


def test_the_first_loss_is_siglips_over_all_pairs_of_the_batch(finished, one_device):
    found = first_embeddings(tiny_towers(**STAGES), one_device)
    (expected,), _ = reference("sigmoid", (1.0,), found.image, found.text, 10.0, -10.0)
    first = lines(finished[0])[0]
    np.testing.assert_allclose(first["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose((first["scale"], first["bias"]), (10.0, -10.0), rtol=1e-6)


def test_eight_devices_have_the_losses_and_parameters_of_one(finished, tmp_path):
    workdir, outcome = finished
    eight = train(tiny_towers(**STAGES), make_mesh(MeshSettings(data=2, fsdp=2, tensor=2)), tmp_path)
    ours, theirs = lines(tmp_path), lines(workdir)
    assert [line["stage"] for line in ours] == ["locked"] * 2 + ["both"] * 2
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in ours], [line["grad_norm"] for line in theirs], rtol=1e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), eight.params, dict(outcome.params))


def test_a_locked_tower_stands_still_and_the_rest_moves(one_device, tmp_path):
    config = tiny_towers(locked=STAGES["locked"])
    start = build(config).initial(jax.random.key(config.seed), one_device)
    params = train(config, one_device, tmp_path).params
    jax.tree.map(np.testing.assert_array_equal, params["image"], start["image"])
    assert params["bias"] != start["bias"] and params["log_scale"] != start["log_scale"]
    kernels = [tree["text"]["blocks"]["layers"]["mlp"]["up"]["kernel"] for tree in (params, start)]
    assert not np.array_equal(*kernels)


def test_the_scale_of_softmax_is_kept_at_most_100_as_in_clip(one_device, tmp_path):
    """Radford et al. 2021, section 2.5; that of SigLIP has no limit but a given one, here below where it begins."""
    limits = [Contrastive(**fields).limits for fields in ({"loss": "softmax"}, {"loss": "sigmoid"})]
    assert limits == [{"log_scale": np.log(100.0)}, {}]
    config = tiny_towers(pairs={"loss": "sigmoid", "max_scale": 9.0, "steps": 2})
    train(config, one_device, tmp_path)
    np.testing.assert_allclose([line["scale"] for line in lines(tmp_path)], [10.0, 9.0], rtol=1e-6)


def test_distillation_learns_from_the_workdir_of_a_teacher_and_resumes_with_it(finished, one_device, tmp_path):
    workdir, outcome = finished
    stage = {"loss": "distillation", "teacher": str(workdir), "distillation_weight": 2.0, "steps": 3}
    config = tiny_towers(taught=stage)
    with config.unlocked():
        config.seed, config.encoder.width = 1, 24

    def terminate(step, steps, metrics):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(config, one_device, tmp_path, progress=terminate)
    train(config, one_device, tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    first = lines(tmp_path)[0]
    student = first_embeddings(config, one_device)
    teacher_config = tiny_towers(taught={})
    with teacher_config.unlocked():
        teacher_config.seed = 1
    teacher = first_embeddings(teacher_config, one_device, outcome.params)
    parts, _ = reference(
        "distillation", (1.0, 2.0), student.image, student.text, 10.0, -10.0, teacher.image, teacher.text, teacher.scale
    )
    np.testing.assert_allclose(first["contrastive_loss"], parts[0], rtol=1e-5)
    np.testing.assert_allclose(first["distillation_loss"], parts[1], rtol=1e-5)
    np.testing.assert_allclose(first["loss"], parts[0] + 2 * parts[1], rtol=1e-5)


def test_the_evaluation_retrieves_unseen_pairs_and_classifies_without_training(finished):
    _, outcome = finished
    config = tiny_towers(**STAGES)
    experiment = build(config)
    samples = experiment.open_source().evaluation(0, "captions")
    names = tuple(sample.answer for sample in samples)
    with config.unlocked():
        config.evaluation.update({"ks": (1, 6), "class_names": names})
    evaluator = evaluator_of(experiment, config)
    rows = list(evaluator.rows(outcome.params))
    accuracy = evaluator.metrics(rows)["accuracy"]
    batch = experiment.captioned(samples)
    found = jax.jit(experiment.system.model.apply)({"params": outcome.params}, *batch.inputs)
    nearest = np.asarray(found.logits()).argmax(axis=1)
    recall = float(np.mean(nearest == np.arange(6)))
    assert accuracy["image_to_text/recall@1"]["mean"] == pytest.approx(recall)
    assert accuracy["text_to_image/recall@6"] == {
        **accuracy["text_to_image/recall@6"],
        "mean": 1.0,
        "n": 6,
    }
    assert accuracy["zero_shot/top_1"]["mean"] == pytest.approx(recall)  # its prompts are the captions
    assert [row["answer"] for row in rows] == [names[index] for index in nearest]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages.locked.accumulate": 2}, r"accumulate: the loss of contrastive is over all pairs of the batch"),
        ({"stages.locked.loss": "sigmoyd"}, r"locked: loss: no 'sigmoyd'; did you mean 'sigmoid'"),
        ({"stages.locked.teacher": "somewhere"}, "teacher: the loss distillation has one, and no other"),
        ({"stages.locked.stream": "questions"}, "the objective contrastive takes captions, got 'questions'"),
        ({"stages.locked.objective": "classify"}, "is a key of the objective contrastive; remove it"),
        ({"encoder.pooling": "none"}, "config.decoder: the image tower returns no pooled vector"),
        ({"encoder.projection_dim": 10}, r"the towers' vectors have widths 10 \(images\) and 12"),
        ({"token_budget": 4}, r"config\.token_budget: this model has no visual tokens"),
        ({"row.text_length": 0}, r"config\.row\.text_length: expected at least 1"),
        ({"connector.scale": -1.0}, r"config\.connector\.scale: expected above 0, got -1"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(one_device, tmp_path, changes, message):
    config = tiny_towers(locked=STAGES["locked"])
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        Trainer(config, build(config), one_device, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_answers_has_no_contrastive_stage(one_device, tmp_path):
    config = tiny_config()
    with config.unlocked():
        config.stages = tiny_towers(pairs={}).stages
        config.schedule = ("pairs",)
        config.stages.pairs.learning_rates = {"encoder": 1e-3}
    with pytest.raises(ConfigError, match="contrastive trains two towers, and this is a VLM"):
        Trainer(config, build(config), one_device, tmp_path / "run")

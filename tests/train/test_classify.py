"""A classifier of digits from the sections of a config, in the trainer and the evaluation."""

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.evals.evaluators import evaluator_of
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.train.loop import Trainer
from vlm_jax.train.workdir import read_lines

from .towers import tiny_towers

STAGE = {
    "objective": "classify", "stream": "captions", "label_smoothing": 0.0, "steps": 40, "batch_size": 16,
    "accumulate": 2, "warmup_steps": 4, "learning_rates": {"encoder": 1e-2, "head": 1e-2},
}  # fmt: skip


def classifier(names="0123456789"):
    """Pages of one digit, whose caption is its name."""
    config = tiny_towers(pairs={}).unlock()
    config.data.update({"rows": 1, "cols": 1, "page_size": 12, "min_digit": 10, "max_digit": 12, "evaluation_size": 40})
    pixels = {key: config.processor[key] for key in ("mean", "std", "filter")}
    config.processor = ConfigDict({"image_size": (12, 12), **pixels})
    config.encoder.update({"patch_size": 6, "projection_dim": None})
    config.row, config.connector = ConfigDict(), ConfigDict()
    config.decoder = ConfigDict({"kind": "class_head", "names": tuple(names)})
    config.optimizer.epsilon = 1e-8
    config.stages, config.evaluation = ConfigDict({"pairs": STAGE}), ConfigDict({"batch_size": 16})
    return config


def test_a_classifier_learns_digits_and_is_evaluated_on_unseen_ones(one_device, tmp_path):
    config = classifier()
    experiment = build(config)
    outcome = Trainer(config, experiment, one_device, tmp_path).run()
    lines = read_lines(epath.Path(tmp_path) / "metrics.jsonl")
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.8 * np.log(10)
    samples = experiment.open_source().evaluation(0, "captions")
    evaluator = evaluator_of(experiment, config)
    evaluator.check()
    rows = list(evaluator.rows(outcome.params))
    top_1 = evaluator.metrics(rows)["accuracy"]["top_1"]
    batch = experiment.labelled(samples)
    logits = jax.jit(experiment.system.model.apply)({"params": outcome.params}, *batch.inputs)
    right = np.asarray(logits).argmax(axis=1) == [int(sample.answer) for sample in samples]
    assert top_1["n"] == 40 and top_1["mean"] == right.mean() > 0.2
    assert [row["correct"] for row in rows] == right.tolist()


def test_captions_and_settings_that_do_not_fit_are_named(one_device, tmp_path):
    experiment = build(classifier("abc"))
    sample = experiment.open_source().evaluation(0, "captions")[0]
    with pytest.raises(
        PictureMismatch, match=r"digits/test/0/captions/0: the caption '\d' is none of the 3 classes a, b, c"
    ):
        experiment.labelled([sample])
    config = classifier()
    config.encoder.pooling = "none"
    with pytest.raises(ConfigError, match="a classifier needs the kind vit, with a pooling"):
        build(config)
    config = classifier()
    config.stages.pairs = {**tiny_towers(pairs={}).stages.pairs.to_dict(), "learning_rates": {"encoder": 1e-3}}
    with pytest.raises(ConfigError, match="contrastive trains two towers, and this is a Classifier"):
        Trainer(config, build(config), one_device, tmp_path)

"""Top-1 accuracy of a classifier."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.build import ImageTextExperiment
from vlm_jax.build.image_text import label_of
from vlm_jax.config import ConfigError
from vlm_jax.evals.report import Report
from vlm_jax.evals.vqa import share
from vlm_jax.models.classifier import Classifier
from vlm_jax.sharding.rules import mesh_of, replicated
from vlm_jax.types import Params, Sample


@dataclasses.dataclass(frozen=True)
class ClassificationSettings:
    """`config.evaluation` of a classifier.

    Attributes:
      batch_size: images per batch.
    """

    batch_size: int

    def __post_init__(self):
        if self.batch_size < 1:
            raise ConfigError(f"config.evaluation.batch_size: expected at least 1, got {self.batch_size}")


def classification(
    experiment: ImageTextExperiment, params: Params, samples: Iterable[Sample], settings: ClassificationSettings
) -> Report:
    """Classifies the image of every sample; the last batch is padded by repeats.

    Raises:
      PictureMismatch: a sample without exactly one image, or whose caption names no class.
    """
    model, mesh = experiment.system.model, mesh_of(params)
    assert isinstance(model, Classifier)
    samples, size = list(samples), settings.batch_size
    labels = [label_of(sample, experiment.labels) for sample in samples]

    def chosen(params: Params, *inputs: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, *inputs)
        assert isinstance(logits, jax.Array)
        return jnp.argmax(logits, axis=-1)

    run, found = replicated(chosen, mesh), []
    for start in range(0, len(samples), size):
        group = samples[start : start + size]
        batch = experiment.labelled(group + [group[-1]] * (size - len(group)))
        found += np.asarray(run(params, *batch.inputs))[: len(group)].tolist()
    right = [label == other for label, other in zip(labels, found, strict=True)]
    rows = [
        {"id": sample.sample_id, "reference": sample.answer, "answer": experiment.labels[index], "correct": correct}
        for sample, index, correct in zip(samples, found, right, strict=True)
    ]
    return Report({"top_1": share(sum(right), len(right))}, rows)

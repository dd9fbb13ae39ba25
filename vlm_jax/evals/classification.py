"""Top-1 accuracy of a classifier."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.build import ImageTextExperiment
from vlm_jax.build.image_text import CAPTIONS, label_of
from vlm_jax.config import check_fields
from vlm_jax.evals.evaluator import batched, told
from vlm_jax.evals.tally import shares
from vlm_jax.models.classifier import Classifier
from vlm_jax.ranges import Count, Size
from vlm_jax.sharding.rules import mesh_of, replicated
from vlm_jax.types import Fields, Params


@dataclasses.dataclass(frozen=True)
class ClassificationSettings:
    """`config.evaluation` of a classifier.

    Attributes:
      batch_size: images per batch.
      every: steps between evaluations during training; None for one at its end alone.
    """

    batch_size: Size
    every: Count | None = None

    def __post_init__(self):
        check_fields(self, "config.evaluation.")


@dataclasses.dataclass(frozen=True)
class Classifying:
    """The most likely class of the image of every sample.

    Attributes:
      experiment: of the run.
      settings: `config.evaluation`.
      seed: of the run, which draws the samples.
    """

    experiment: ImageTextExperiment
    settings: ClassificationSettings
    seed: int

    @property
    def every(self) -> int | None:
        """`config.evaluation.every`."""
        return self.settings.every

    def check(self) -> None:
        """Raises a PictureMismatch for a caption that names no class."""
        for name, caption in self.experiment.open_source().references(self.seed, CAPTIONS):
            label_of(name, caption, self.experiment.labels)

    def rows(self, params: Params) -> Iterator[Fields]:
        """The class of each image."""
        model, mesh = self.experiment.system.model, mesh_of(params)
        assert isinstance(model, Classifier)

        def chosen(params: Params, *inputs: jax.Array) -> jax.Array:
            logits = model.apply({"params": params}, *inputs)
            assert isinstance(logits, jax.Array)
            return jnp.argmax(logits, axis=-1)

        run = replicated(chosen, mesh)
        samples: Any = self.experiment.open_source().evaluation(self.seed, CAPTIONS)
        for group, padded in batched(samples, self.settings.batch_size):
            found = np.asarray(run(params, *self.experiment.labelled(padded).inputs)).tolist()
            for sample, index in zip(group, found, strict=False):
                answer = self.experiment.labels[index]
                right = answer == sample.answer.strip()
                yield {"sample_id": sample.sample_id, "reference": sample.answer, "answer": answer, "correct": right}

    def metrics(self, rows: Iterable[Fields]) -> Fields:
        """Top-1 accuracy."""
        return {"accuracy": shares(rows, {"top_1": lambda row: row["correct"]})}

    def lines(self, metrics: Fields) -> list[str]:
        """One line."""
        return told(metrics["accuracy"])

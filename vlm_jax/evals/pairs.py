"""Evaluation of two towers on captioned images: retrieval, and zero-shot classification."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from vlm_jax.build import ImageTextExperiment
from vlm_jax.build.image_text import label_of
from vlm_jax.config import ConfigError
from vlm_jax.evals.report import Report
from vlm_jax.evals.retrieval import retrieval_recall
from vlm_jax.evals.vqa import share
from vlm_jax.evals.zero_shot import class_embeddings, top_k_accuracy
from vlm_jax.models.two_tower import TwoTower, normalise
from vlm_jax.sharding.rules import mesh_of, replicated
from vlm_jax.types import Params, Sample


@dataclasses.dataclass(frozen=True)
class PairSettings:
    """`config.evaluation` of two towers.

    Attributes:
      batch_size: images, and captions, per batch.
      ks: numbers of candidates of recall.
      class_names: classes of zero-shot classification, among which captions are; empty for none.
      templates: prompts of a class, each with one `{}` for its name.
    """

    batch_size: int
    ks: tuple[int, ...] = (1, 5, 10)
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)

    def __post_init__(self):
        if self.batch_size < 1 or not self.ks or min(self.ks) < 1:
            raise ConfigError("config.evaluation: expected batch_size of at least 1, and ks of at least 1")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ConfigError(f"config.evaluation.templates: expected one {{}} in each, got {template!r}")


def pairs(experiment: ImageTextExperiment, params: Params, samples: Iterable[Sample], settings: PairSettings) -> Report:
    """Recall of every sample's caption among all captions, and of its image among all images.

    Rows have the caption that is the most similar to each image. With `class_names` the images are classified too.

    Raises:
      PictureMismatch: a sample without exactly one image, or whose caption is not among the classes.
    """
    samples = list(samples)
    labels = [label_of(sample, settings.class_names) for sample in samples] if settings.class_names else []
    of_images, of_texts = _encoders(experiment, params)
    image, text = [], []
    for start in range(0, len(samples), settings.batch_size):
        group = samples[start : start + settings.batch_size]
        batch = experiment.captioned(group + [group[-1]] * (settings.batch_size - len(group)))
        image.append(of_images(batch.images)[: len(group)])
        text.append(of_texts(batch.tokens)[: len(group)])
    image, text, count = np.concatenate(image), np.concatenate(text), len(samples)
    recall = retrieval_recall(image, text, ks=settings.ks)
    accuracy = {name: share(round(value * count), count) for name, value in recall.items()}
    if labels:
        accuracy |= _zero_shot(experiment, of_texts, image, np.asarray(labels), settings)
    nearest = [samples[index].answer for index in np.argmax(image @ text.T, axis=1)]
    rows = [
        {"id": sample.sample_id, "reference": sample.answer, "answer": answer, "correct": answer == sample.answer}
        for sample, answer in zip(samples, nearest, strict=True)
    ]
    return Report(accuracy, rows)


def _encoders(
    experiment: ImageTextExperiment, params: Params
) -> tuple[Callable[[Any], np.ndarray], Callable[[Any], np.ndarray]]:
    """Functions of preprocessed images, and of ids, that return vectors of norm 1."""
    model, mesh = experiment.system.model, mesh_of(params)
    assert isinstance(model, TwoTower)

    def encoder(method: str) -> Callable[[Any], np.ndarray]:
        def encode(params: Params, inputs: Any) -> jax.Array:
            found = model.apply({"params": params}, inputs, method=method)
            assert isinstance(found, jax.Array)
            return normalise(found)

        run = replicated(encode, mesh)
        return lambda inputs: np.asarray(run(params, inputs))

    return encoder("encode_image"), encoder("encode_text")


def _zero_shot(
    experiment: ImageTextExperiment,
    of_texts: Callable[[Any], np.ndarray],
    image: np.ndarray,
    labels: np.ndarray,
    settings: PairSettings,
) -> dict[str, dict[str, float | int]]:
    def encode(prompts: list[str]) -> np.ndarray:
        return of_texts(experiment.processor(texts=prompts).tokens)

    classes = class_embeddings(encode, settings.class_names, settings.templates, batch_size=settings.batch_size)
    value = top_k_accuracy(image, classes, labels)
    return {"zero_shot/top_1": share(round(value * len(labels)), len(labels))}

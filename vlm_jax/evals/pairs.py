"""Captioned images as what two towers are evaluated by: retrieval, and zero-shot classification."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from vlm_jax.build import ImageTextExperiment
from vlm_jax.build.image_text import CAPTIONS, label_of
from vlm_jax.config import ConfigError, check_fields
from vlm_jax.evals.evaluator import batched, told
from vlm_jax.evals.retrieval import retrieval_ranks
from vlm_jax.evals.tally import shares
from vlm_jax.evals.zero_shot import class_embeddings, class_ranks
from vlm_jax.models.two_tower import TwoTower, normalise
from vlm_jax.ranges import Count, Size
from vlm_jax.sharding.rules import mesh_of, replicated
from vlm_jax.types import Fields, Params

ZERO_SHOT = "zero_shot"  # rank of an image's class


@dataclasses.dataclass(frozen=True)
class PairSettings:
    """`config.evaluation` of two towers.

    Attributes:
      batch_size: images, and captions, per batch.
      ks: numbers of candidates of recall.
      class_names: classes of zero-shot classification, among which captions are; empty for none.
      templates: prompts of a class, each with one `{}` for its name.
      every: steps between evaluations during training; None for one at its end alone.
    """

    batch_size: Size
    ks: tuple[Count, ...] = (1, 5, 10)
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)
    every: Count | None = None

    def __post_init__(self):
        check_fields(self, "config.evaluation.")
        if not self.ks:
            raise ConfigError("config.evaluation.ks: expected at least one number of candidates, got none")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ConfigError(f"config.evaluation.templates: expected one {{}} in each, got {template!r}")


@dataclasses.dataclass(frozen=True)
class Matching:
    """Recall of every caption among all captions, and of its image among all images; and of its class by prompts.

    A row has the caption that is the most similar to its image, and the number of wrong candidates before the right
    one: `image_to_text`, `text_to_image`, and with `class_names` `zero_shot`.

    Attributes:
      experiment: of the run.
      settings: `config.evaluation`.
      seed: of the run, which draws the samples.
    """

    experiment: ImageTextExperiment
    settings: PairSettings
    seed: int

    @property
    def every(self) -> int | None:
        """`config.evaluation.every`."""
        return self.settings.every

    def check(self) -> None:
        """Raises a PictureMismatch for a caption that is not among the classes."""
        if self.settings.class_names:
            for name, caption in self.experiment.open_source().references(self.seed, CAPTIONS):
                label_of(name, caption, self.settings.class_names)

    def rows(self, params: Params) -> Iterator[Fields]:
        """All rows, when all images and captions are embedded.

        A rank compares a query with all candidates, so the embeddings of all samples are kept on the host: of `D`
        dimensions in float32, 8 D bytes a sample (6 KiB for 768), and twice that while those of the batches are
        joined; also ids and captions. Pictures are not, and of similarities `block_size` rows of `retrieval_ranks`.
        """
        of_images, of_texts = _encoders(self.experiment, params)
        names, captions, image, text = [], [], [], []
        samples: Any = self.experiment.open_source().evaluation(self.seed, CAPTIONS)
        for group, padded in batched(samples, self.settings.batch_size):
            batch = self.experiment.captioned(padded)
            names += [sample.sample_id for sample in group]
            captions += [sample.answer for sample in group]
            image.append(of_images(batch.images)[: len(group)])
            text.append(of_texts(batch.tokens)[: len(group)])
        image, text = np.concatenate(image), np.concatenate(text)
        ranks = retrieval_ranks(image, text)
        if self.settings.class_names:
            ranks[ZERO_SHOT] = self._class_ranks(of_texts, image, names, captions)
        for index, (name, caption) in enumerate(zip(names, captions, strict=True)):
            answer = captions[int(np.argmax(text @ image[index]))]
            row = {"sample_id": name, "reference": caption, "answer": answer, "correct": answer == caption}
            yield row | {key: int(values[index]) for key, values in ranks.items()}

    def metrics(self, rows: Iterable[Fields]) -> Fields:
        """Recall at every k in both directions, and zero-shot accuracy."""
        keys = {f"{way}/recall@{k}": (way, k) for way in ("image_to_text", "text_to_image") for k in self.settings.ks}
        if self.settings.class_names:
            keys[f"{ZERO_SHOT}/top_1"] = ZERO_SHOT, 1
        hits = {name: functools.partial(_is_hit, key, k) for name, (key, k) in keys.items()}
        return {"accuracy": shares(rows, hits)}

    def lines(self, metrics: Fields) -> list[str]:
        """One line for each number."""
        return told(metrics["accuracy"])

    def _class_ranks(
        self, of_texts: Callable[[Any], np.ndarray], image: np.ndarray, names: Sequence[str], captions: Sequence[str]
    ) -> np.ndarray:
        def encode(prompts: list[str]) -> np.ndarray:
            return of_texts(self.experiment.processor(texts=prompts).tokens)

        known, settings = self.settings.class_names, self.settings
        labels = [label_of(name, caption, known) for name, caption in zip(names, captions, strict=True)]
        classes = class_embeddings(encode, known, settings.templates, batch_size=settings.batch_size)
        return class_ranks(image, classes, np.asarray(labels))


def _is_hit(key: str, k: int, row: Fields) -> bool:
    """Whether fewer than `k` wrong candidates are before the right one."""
    return row[key] < k


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

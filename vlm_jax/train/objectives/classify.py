"""Classification of images whose captions name a class."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Annotated, Any, ClassVar, cast

import jax
import jax.numpy as jnp
import optax

from vlm_jax.build import AnyExperiment, ImageTextExperiment
from vlm_jax.build.image_text import CAPTIONS
from vlm_jax.config import ConfigError, check_fields
from vlm_jax.models.classifier import Classifier
from vlm_jax.ranges import Range
from vlm_jax.train.objectives.objective import Loss, Metrics, Objective
from vlm_jax.types import ImageTextBatch, Params, Sample, Tree


@dataclasses.dataclass(frozen=True)
class Classify(Objective):
    """Cross entropy of an image's class; the metric `accuracy` is the share of right ones in the batch.

    Attributes:
      label_smoothing: share of the target that is spread evenly over all classes, in [0, 1).

    Source: Szegedy et al. 2016, section 7.
    """

    label_smoothing: Annotated[float, Range(0, below=1)] = 0.0

    streams: ClassVar[tuple[str, ...]] = (CAPTIONS,)

    def __post_init__(self):
        check_fields(self, "")

    def check(self, experiment: AnyExperiment, *, accumulate: int, path: str) -> None:
        """Requires a classifier of images."""
        del accumulate
        model = experiment.system.model
        if not isinstance(model, Classifier):
            raise ConfigError(
                f"{path}.objective: classify trains a classifier, and this is a {type(model).__name__}; set "
                "config.decoder.kind to class_head"
            )
        if model.encoder.pooling == "none":
            raise ConfigError(f"{path}.objective: this release classifies tokens; classify needs one class of an image")

    def build(self, experiment: AnyExperiment, trained: Collection[str] = ()) -> Loss:
        """See the class."""
        del trained
        model = experiment.system.model
        assert isinstance(model, Classifier)
        return _classify(cast(Any, model), self.label_smoothing)

    def element(self, experiment: AnyExperiment, stream: str) -> Callable[[Any], Tree]:
        """An image with its class."""
        del stream
        assert isinstance(experiment, ImageTextExperiment)
        return functools.partial(_labelled, experiment)

    def example(self, experiment: AnyExperiment, stream: str) -> Tree:
        """An image with its class."""
        del stream
        (images,) = experiment.system.inputs
        return ImageTextBatch(images, labels=cast(Any, jax.ShapeDtypeStruct((1,), jnp.int32)))


def _labelled(experiment: ImageTextExperiment, sample: Sample) -> ImageTextBatch:
    return experiment.labelled([sample])


@functools.lru_cache(maxsize=64)
def _classify(model: Classifier, label_smoothing: float) -> Loss:
    def loss(
        params: Params,
        batch: ImageTextBatch,
        key: jax.Array,
        weight: jax.Array | float = 1.0,
        reference: Params | None = None,
    ) -> tuple[jax.Array, Metrics]:
        del key, weight, reference  # every image has one class
        logits = model.apply({"params": params}, *batch.inputs)
        assert isinstance(logits, jax.Array) and batch.labels is not None
        targets = optax.smooth_labels(jax.nn.one_hot(batch.labels, model.num_classes), label_smoothing)
        value = optax.softmax_cross_entropy(logits, targets).mean()
        right = jnp.argmax(logits, axis=-1) == batch.labels
        return value, {"accuracy": right.mean(dtype=jnp.float32)}

    return loss

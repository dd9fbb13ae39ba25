"""What an objective is: the keys of a stage that belong to it, and the loss and the rows that it makes."""

import abc
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from vlm_jax.build import AnyExperiment, Experiment
from vlm_jax.config import ConfigError
from vlm_jax.types import Params, Tree

Metrics = dict[str, jax.Array]


# The loss of a batch and named scalar metrics, from (params, batch, key, weight=1.0, reference=None):
#   params: of all parts.
#   batch: of the stage's stream.
#   key: random key of the step.
#   weight: of a microbatch: its learned tokens relative to the mean of the step's microbatches. Means over tokens are
#     multiplied by it, so that the plain mean over microbatches of the loss and of each metric is that of the whole
#     batch.
#   reference: as returned by `Objective.reference`.
Loss = Callable[..., tuple[jax.Array, Metrics]]


class Objective(abc.ABC):
    """Settings of an objective: a subclass is a frozen dataclass, whose fields are keys of `config.stages.LABEL`.

    Attributes:
      streams: streams of the data whose elements it takes.
      packs: whether samples may share a row, and rows have buckets of lengths.
    """

    streams: ClassVar[tuple[str, ...]]
    packs: ClassVar[bool] = False

    @abc.abstractmethod
    def check(self, experiment: AnyExperiment, *, accumulate: int, path: str) -> None:
        """Raises a ConfigError where the objective does not suit the model or the stage.

        Args:
          experiment: the run's.
          accumulate: of the stage.
          path: of the stage in the config.
        """

    @abc.abstractmethod
    def build(self, experiment: AnyExperiment, trained: Collection[str]) -> Loss:
        """The loss; the same object for equal settings and models, so that equal steps are compiled once.

        Args:
          experiment: its model is trained.
          trained: parts of the model that the stage trains.
        """

    @abc.abstractmethod
    def element(self, experiment: AnyExperiment, stream: str) -> Callable[[Any], Tree]:
        """The function that makes a batch of one of an element of the stream; it can be pickled."""

    def example(self, experiment: AnyExperiment, stream: str) -> Tree:
        """Shapes of a batch of one, as of `element`, without data: for plans.

        Raises:
          ConfigError: the objective has none.
        """
        del experiment, stream
        raise ConfigError(f"objective: {type(self).__name__} cannot be planned without its data; plan another stage")

    @property
    def limits(self) -> Mapping[str, float]:
        """The largest values that a step leaves parameters, by path."""
        return {}

    def reference_shapes(self, trained: Params) -> Params | None:
        """Shapes of `reference`, in the boxes that name their axes.

        Args:
          trained: shapes of the trained parameters, in boxes.
        """
        del trained

    def reference(self, trained: Params, mesh: Mesh) -> Params | None:
        """Frozen parameters that the loss needs beside the model's, from the start of the stage; None without any.

        Args:
          trained: the trained parameters at the start of the stage.
          mesh: devices of the parameters.
        """
        del trained, mesh


def of_conversations(experiment: AnyExperiment, path: str, name: str) -> Experiment:
    """The experiment of a model that answers.

    Args:
      experiment: the run's.
      path: of the stage in the config.
      name: of the objective.

    Raises:
      ConfigError: the model has no conversations.
    """
    if not isinstance(experiment, Experiment):
        raise ConfigError(
            f"{path}.objective: {name} trains a model that answers, and this is a "
            f"{type(experiment.system.model).__name__}; use contrastive for two towers, classify for a classifier"
        )
    return experiment

"""The interface of metrics: how answers of a task are scored, one by one and all together."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Response:
    """An answer of a model, and what it is compared with.

    Attributes:
      text: what the model said.
      references: right answers, at least one.
      question: the text of the last message before the answer.
      group: of the answers with the same pictures, which are not independent of each other.
      is_finished: whether the answer has an end; False where it was cut off by the maximum number of tokens.
    """

    text: str
    references: tuple[str, ...]
    question: str = ""
    group: str = ""
    is_finished: bool = True


@runtime_checkable
class Metric(Protocol):
    """Scores the answers of a task.

    Numbers of many answers are functions of sums of per-answer statistics, so that resampled answers need no second
    look at the texts.

    Attributes:
      values: names of the numbers of many answers, in order.
      num_statistics: numbers per answer.
      needs_all: whether the statistics of an answer depend on the other answers, or on their references.
    """

    values: ClassVar[tuple[str, ...]]
    num_statistics: ClassVar[int]
    needs_all: ClassVar[bool]

    def score(self, response: Response) -> bool | float:
        """How much of an answer is right, in [0, 1]; a bool where answers are right or wrong."""
        ...

    def statistics(self, responses: Sequence[Response]) -> Float[np.ndarray, "responses statistics"]:
        """The statistics of each answer; of all answers together if `needs_all`."""
        ...

    def of_sums(self, sums: Float[np.ndarray, "*resamples statistics"]) -> Float[np.ndarray, "*resamples values"]:
        """The `values`, from statistics that are summed over answers; finite, 0 where one is undefined."""
        ...


class MeanScore(abc.ABC):
    """What metrics share whose only number of many answers is the mean of their scores."""

    values: ClassVar[tuple[str, ...]] = ("mean",)
    num_statistics: ClassVar[int] = 2
    needs_all: ClassVar[bool] = False

    @abc.abstractmethod
    def score(self, response: Response) -> bool | float:
        """As `Metric.score`."""

    def statistics(self, responses: Sequence[Response]) -> Float[np.ndarray, "responses statistics"]:
        """As `Metric.statistics`: the score, and 1."""
        return np.array([(float(self.score(response)), 1.0) for response in responses]).reshape(-1, 2)

    def of_sums(self, sums: Float[np.ndarray, "*resamples statistics"]) -> Float[np.ndarray, "*resamples values"]:
        """As `Metric.of_sums`."""
        return ratio(sums[..., 0], sums[..., 1])[..., None]


def ratio(above: ArrayLike, below: ArrayLike) -> np.ndarray:
    """Quotients of arrays of one shape; 0 where the divisor is 0."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)

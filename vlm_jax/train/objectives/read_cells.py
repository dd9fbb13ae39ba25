"""Classes and boxes of the cells of a page: dense supervision of an encoder."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp

from vlm_jax.build import AnyExperiment
from vlm_jax.config import check_fields
from vlm_jax.losses.cross_entropy import cross_entropy
from vlm_jax.models.cell_reader import CellReader
from vlm_jax.ranges import NonNegative
from vlm_jax.train.objectives.objective import Loss, Metrics, Objective, of_conversations
from vlm_jax.types import CellBatch, Params, Tree


@dataclasses.dataclass(frozen=True)
class ReadCells(Objective):
    """Class and box of every cell of a page, from the encoder's features.

    Attributes:
      box_weight: of the boxes' L1, beside the classes' cross entropy. Its gradient has the same size however small the
        L1 is, so that a large weight keeps a small encoder from learning the classes.

    Source: cross entropy and 5 times L1 as in Carion et al. 2020 (DETR), section 3.1, without
    the matching, since every cell has a target.
    """

    box_weight: NonNegative = 5.0

    streams: ClassVar[tuple[str, ...]] = ("cells",)

    def __post_init__(self):
        check_fields(self, "")

    def check(self, experiment: AnyExperiment, *, accumulate: int, path: str) -> None:
        """Refuses a model without conversations."""
        del accumulate
        of_conversations(experiment, path, "read_cells")

    def build(self, experiment: AnyExperiment, trained: Collection[str] = ()) -> Loss:
        """See the class."""
        del trained
        reader = of_conversations(experiment, "config.stages", "read_cells").cell_reader
        assert reader is not None  # set where a stage has this objective
        return _read_cells(cast(Any, reader), self.box_weight)

    def element(self, experiment: AnyExperiment, stream: str) -> Callable[[Any], Tree]:
        """The stream has batches of one."""
        del experiment, stream
        return as_it_is


def as_it_is(element: Tree) -> Tree:
    """The element."""
    return element


@functools.lru_cache(maxsize=64)
def _read_cells(reader: CellReader, box_weight: float) -> Loss:
    def loss(
        params: Params,
        batch: CellBatch,
        key: jax.Array,
        weight: jax.Array | float = 1.0,
        reference: Params | None = None,
    ) -> tuple[jax.Array, Metrics]:
        del key, weight, reference  # every row has as many cells
        variables = {"params": {"encoder": params["encoder"], **params["cell_head"]}}
        logits, boxes = reader.apply(variables, batch.images[:, 0])
        classes = jnp.broadcast_to(batch.classes[..., None], logits.shape[:-1])
        value, accuracy = cross_entropy(logits, classes, jnp.ones(classes.shape))
        distance = jnp.abs(boxes - batch.boxes[..., None, :]).sum(-1).mean()
        return value + box_weight * distance, {"accuracy": accuracy, "box_l1": distance}

    return loss

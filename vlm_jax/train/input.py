"""Batches of a stage's stream."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
from jax.sharding import Mesh

from vlm_jax.build import AnyExperiment, Experiment
from vlm_jax.data.loader import batches
from vlm_jax.data.packing import PackedRows, SingleRows, bucket_of, buckets, fingerprint
from vlm_jax.data.source import SizedStream
from vlm_jax.sharding.rules import batch_shards
from vlm_jax.train.stages import Stage
from vlm_jax.types import Batch, Load, RowShape, Tree

ROWS = "rows"  # folder of a workdir that loads of samples are kept in


class Given(NamedTuple):
    """A batch on the devices, its tokens, and the seconds for which the devices waited for it at most."""

    batch: Tree
    tokens: dict[str, int]
    waited: float


class PlannedRows:
    """Random access to training rows whose samples, or whose length, follow from what the samples take of a row.

    Samples that cannot be read are left out of their rows. Row i has the shape of the batch that it is in: the
    smallest of `shapes` that holds all rows of the batch, those of other hosts too.
    """

    def __init__(
        self, experiment: Experiment, stream: SizedStream, shapes: Sequence[RowShape], batch_size: int, plan: Any
    ):
        self._experiment, self._stream, self._shapes = experiment, stream, shapes
        self._batch_size, self._plan = batch_size, plan
        self._shape_of_batch = functools.lru_cache(maxsize=64)(self._bucket)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_shape_of_batch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._shape_of_batch = functools.lru_cache(maxsize=64)(self._bucket)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Batch:
        shape = self._shape_of_batch(index // self._batch_size)
        samples = [self._stream.samples[element] for element in self._plan[index]]
        return self._experiment.training_row(*(one for one in samples if one is not None), shape=shape)

    def _bucket(self, batch: int) -> RowShape:
        if len(self._shapes) == 1:
            return self._shapes[0]
        first = batch * self._batch_size
        return bucket_of(self._plan.loads(range(first, first + self._batch_size)), self._shapes)


class Measure:
    """What the sample of a stream's element takes of a row; nothing where it cannot be read."""

    def __init__(self, experiment: Experiment, stream: SizedStream, shape: RowShape):
        self._experiment, self._stream, self._none = experiment, stream, Load(0, 0, (0,) * len(shape.kept))

    def __call__(self, element: int) -> Load:
        sizes = self._stream.sizes[element]
        return self._none if sizes is None else self._experiment.measure(sizes)

    def name(self, element: int) -> str:
        """Of the sample, for messages."""
        sizes = self._stream.sizes[element]
        return f"element {element}" if sizes is None else f"'{sizes.sample_id}'"


def rows(
    experiment: AnyExperiment,
    stage: Stage,
    seed: int,
    *,
    folder: str | os.PathLike[str] | None = None,
) -> grain.MapDataset[Any]:
    """Batches of one of a stage's stream, element i made from (seed, i) by the stage's objective.

    Args:
      experiment: the run's.
      stage: whose stream; and whose batch size, where rows have buckets of lengths.
      seed: of the run.
      folder: where loads of samples are kept, for this config alone; None keeps none.
    """
    # Worker processes get a copy, which needs no tensors of the checkpoint.
    experiment = dataclasses.replace(experiment, system=dataclasses.replace(experiment.system, release=None))
    source, stream = experiment.open_source(), stage.stream
    if not isinstance(experiment, Experiment) or not stage.settings.packs or experiment.rows.are_single:
        return source.train(stream, seed).map(stage.settings.element(experiment, stream))
    settings, shape = experiment.rows, experiment.text_rows.get(stream, experiment.row)
    sized = source.sized(stream, seed)
    measure = Measure(experiment, sized, shape)
    if settings.pack:
        plan = PackedRows(
            measure,
            shape,
            seed=seed,
            epoch=sized.epoch,
            folder=folder,
            fingerprint=fingerprint({"data": sized.fingerprint, "stream": stream}),
            name_of=measure.name,
        )
    else:
        plan = SingleRows(measure, shape, name_of=measure.name)
    return grain.MapDataset.source(
        PlannedRows(experiment, sized, buckets(shape, settings.buckets), stage.batch_size, plan)
    )


def stage_batches(
    experiment: AnyExperiment,
    stage: Stage,
    seed: int,
    mesh: Mesh,
    *,
    num_workers: int = 0,
    folder: str | os.PathLike[str] | None = None,
    start: int = 0,
) -> grain.DatasetIterator[Any]:
    """This process's part of a stage's batches, from batch number `start` on, for `sharding.rules.distribute`.

    Args:
      experiment, stage, seed, folder: as of `rows`.
      mesh: devices over which the rows of a batch are divided.
      num_workers: processes that make the batches; 0 for a thread of this one.
      start: batches of the stage that are done, with any number of workers.
    """
    shards = batch_shards(mesh)
    return batches(
        rows(experiment, stage, seed, folder=folder),
        stage.batch_size,
        shards=shards.own,
        shard_count=shards.count,
        num_workers=num_workers,
        start=start,
    )

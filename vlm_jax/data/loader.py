"""Batches of a stream: in order, sharded, checkpointable, and reproducible by index.

The stream is a `grain.MapDataset` of batches of one (leading dimension 1), finite or not. Batch
`step` joins batch_size elements from step * batch_size on; shard s of n is the s-th of n equal parts of it. So a batch
depends only on the stream and the step: not on threads, previous reads, or the number of shards. A host reads one shard
or several; hosts that compute the same rows together, each with other heads or positions, read the same shards.
"""

from collections.abc import Sequence
from typing import TypeVar

import grain
import jax
import numpy as np
from absl import flags

from vlm_jax.config import ConfigError
from vlm_jax.types import Batch, CellBatch, DistilledBatch, ImageTextBatch, Tree

AnyBatch = Batch | CellBatch | DistilledBatch | ImageTextBatch
Rows = TypeVar("Rows", Batch, CellBatch, DistilledBatch, ImageTextBatch)


def join(rows: Sequence[Rows]) -> Rows:
    """Concatenates batches in order, as NumPy arrays.

    Raises:
      ValueError: the batches differ in shape, or in their fields.
    """
    leaves, structure = jax.tree.flatten(rows[0])
    columns = [leaves]
    for place, row in enumerate(rows[1:], start=1):
        other, other_structure = jax.tree.flatten(row)
        if other_structure != structure:
            raise ValueError(
                f"element {place} of the batch has other fields than element 0: {other_structure} and "
                f"{structure}; every sample of a stream must have the same number of images"
            )
        columns.append(other)
    for field in zip(*columns, strict=True):
        if len({leaf.shape[1:] for leaf in field}) > 1:
            raise ValueError(
                f"the elements of a batch differ in shape: {sorted({leaf.shape[1:] for leaf in field})}; "
                "resize the images and pad the rows to one size"
            )
    return jax.tree.unflatten(structure, [np.concatenate(field) for field in zip(*columns, strict=True)])


class _Batches:
    """Random access to some shards of every batch."""

    def __init__(self, dataset: grain.MapDataset, batch_size: int, shards: Sequence[int], shard_count: int):
        if batch_size < 1 or shard_count < 1 or batch_size % shard_count:
            raise ConfigError(
                f"config.stages: a batch_size of {batch_size} cannot be divided evenly over "
                f"{shard_count} shards; set it to a positive multiple of {shard_count}"
            )
        if not shards or not set(shards) <= set(range(shard_count)):
            raise ValueError(f"shards must be one or more of [0, {shard_count}), got {tuple(shards)}")
        if len(dataset) < batch_size:
            raise ConfigError(
                f"config.stages: the data has {len(dataset)} samples, too few for a batch_size of {batch_size}"
            )
        self._dataset = dataset
        self._batch_size = batch_size
        size = batch_size // shard_count
        self._places = [place for shard in shards for place in range(shard * size, (shard + 1) * size)]

    def __len__(self) -> int:
        return len(self._dataset) // self._batch_size

    def __getitem__(self, index: int) -> AnyBatch:
        rows: list[Tree] = [self._dataset[index * self._batch_size + place] for place in self._places]
        return join(rows)


def batch_at(
    dataset: grain.MapDataset, batch_size: int, step: int, *, shards: Sequence[int] = (0,), shard_count: int = 1
) -> AnyBatch:
    """Batch number `step` (from 0), equal to the one that `batches` yields at that step.

    Args:
      dataset: stream of batches of one.
      batch_size: rows of the global batch.
      step: index of the batch.
      shards: numbers of the shards, in [0, shard_count), in the order of the result.
      shard_count: number of shards of equally many rows; 1 for the global batch.

    Raises:
      ConfigError: batch_size is not a multiple of shard_count, or larger than the dataset.
      IndexError: the dataset has no batch `step`.
    """
    steps = _Batches(dataset, batch_size, shards, shard_count)
    if not 0 <= step < len(steps):
        raise IndexError(f"the data has {len(steps)} batches of {batch_size}, but not step {step}")
    return steps[step]


def batches(
    dataset: grain.MapDataset,
    batch_size: int,
    *,
    shards: Sequence[int] = (0,),
    shard_count: int = 1,
    num_threads: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
    start: int = 0,
) -> grain.DatasetIterator:
    """Iterates over some shards of every batch; a last, smaller batch is dropped.

    The iterator is a checkpoint item of Orbax (`grain.checkpoint`), or `get_state` and `set_state`
    resume it at the next batch. An error in a thread or worker is raised by `next`.

    Args:
      dataset: stream of batches of one.
      batch_size: rows of the global batch; a shard has batch_size / shard_count.
      shards: numbers of those of this host, in [0, shard_count), in the order of a batch.
      shard_count: number of shards of equally many rows.
      num_threads: threads that prefetch batches; 0 loads them in `next`.
      num_workers: processes with such threads, each loading every num_workers-th batch; 0 loads
        batches in this process. `close` of the iterator stops them.
      prefetch: batches to prefetch, at least num_threads to keep all threads busy.
      start: number of the first batch.

    Raises:
      ConfigError: batch_size is not a multiple of shard_count, or larger than the dataset.
    """
    steps = grain.MapDataset.source(_Batches(dataset, batch_size, shards, shard_count))[start:]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    made = steps.to_iter_dataset(options)
    if num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads its own flags; they keep their defaults
        made = made.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=prefetch))
    return iter(made)

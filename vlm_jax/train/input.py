"""Batches of a stage's stream."""

from typing import Any

import grain
import jax

from vlm_jax.build import Experiment
from vlm_jax.data.loader import batches
from vlm_jax.train.stages import Stage


def rows(experiment: Experiment, stream: str, seed: int) -> grain.MapDataset:
    """The rows of a stream, batches of one made by the processor; element i depends on (seed, i)."""
    dataset = experiment.open_source().train(stream, seed)
    if stream == "cells":
        return dataset
    return dataset.map(experiment.text_page if stream == "text_pages" else experiment.training_row)


def stage_batches(
    experiment: Experiment, stage: Stage, seed: int, *, num_workers: int = 0
) -> grain.DatasetIterator[Any]:
    """This process's part of a stage's batches, from the first; its state can be saved and set.

    Args:
      experiment: the run's experiment.
      stage: provides the stream and batch size.
      seed: seed of the run.
      num_workers: processes that load batches; 0 for a thread of this process.
    """
    return batches(
        rows(experiment, stage.stream, seed),
        stage.batch_size,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
        num_workers=num_workers,
    )

"""From a stage's stream to device batches."""

import dataclasses
from typing import Any

import grain
import jax

from vlm_jax.build import System
from vlm_jax.data.loader import batches
from vlm_jax.train.stages import Stage


def rows(system: System, stream: str, seed: int) -> grain.MapDataset:
    """The rows of a stream, element i made from (seed, i): samples laid out by the processor."""
    dataset = system.open_source().train(stream, seed)
    if stream == "cells":
        return dataset
    processor = system.processor
    if stream == "text_pages":
        visual = processor.num_images * processor.num_visual_tokens
        length = processor.max_length - visual + system.source.context_length
        processor = dataclasses.replace(processor, num_images=0, max_length=length)
    return dataset.map(processor)


def stage_batches(system: System, stage: Stage, seed: int, *, num_workers: int = 0) -> grain.DatasetIterator[Any]:
    """This process's share of a stage's batches, from the first; its state can be saved and set.

    Args:
      system: the run's.
      stage: whose stream and batch size.
      seed: of the run.
      num_workers: processes that make the batches; 0 for a thread of this one.
    """
    return batches(
        rows(system, stage.stream, seed),
        stage.batch_size,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
        num_workers=num_workers,
    )

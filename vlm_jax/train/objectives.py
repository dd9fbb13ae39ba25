"""Training objectives, with one signature.

An objective is called with the parameters of all parts, a batch of its stream,
and a random key; it returns the loss and named scalar metrics. A last argument `weight` is for a microbatch:
its learned tokens relative to the mean of the step's microbatches. Means over tokens are multiplied by it, so
that the plain mean over microbatches of the loss and of each metric is that of the whole batch.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax import axes
from vlm_jax.build import CELL_HEAD, Experiment
from vlm_jax.decoders.decoder import HeadKernel
from vlm_jax.layers.scan import LOSSES
from vlm_jax.losses.cross_entropy import cross_entropy, head_cross_entropy
from vlm_jax.losses.vocabulary_blocks import Blocks
from vlm_jax.models.cell_reader import CellReader
from vlm_jax.sharding.rules import MeshAxes, partition_spec
from vlm_jax.train.stages import Stage
from vlm_jax.types import PADDING_SEGMENT, Batch, CellBatch, Params

Metrics = dict[str, jax.Array]
Objective = Callable[..., tuple[jax.Array, Metrics]]  # (params, batch, key, weight=1.0)

# Logits that a device holds at once, but at least MIN_IDS ids at each of its positions. Fewer bytes save none: blocks
# hold the gradient of the whole kernel beside them, and compute logits twice.
LOGITS_BYTES = 128 * 2**20
MIN_IDS = 512  # narrower products would take longer to add than to compute
BOX_WEIGHT = 5.0  # weight of the boxes' L1 relative to the classes' cross entropy, as in DETR


def next_token(experiment: Experiment, z_loss: float = 0.0, logits_bytes: int | None = None) -> Objective:
    """Cross entropy of the answers' tokens, given images (or only text) and questions.

    What modules sow into the collection `losses`, such as a router's balance loss, is added to it. The metric
    `padding_share` is the share of the rows' positions that are padding; `z_loss` is in the metrics where it is on.

    Args:
      experiment: its model is trained.
      z_loss: weight of the z-loss, see `losses.cross_entropy.head_cross_entropy`.
      logits_bytes: bound of the float32 logits that a device holds at once; None for `LOGITS_BYTES`.
    """
    return _next_token(experiment.system.model, z_loss, logits_bytes)


@functools.lru_cache(maxsize=64)  # equal objectives are one object, so that equal steps are compiled once
def _next_token(model: nn.Module, z_loss: float, logits_bytes: int | None) -> Objective:
    def loss(
        params: Params, batch: Batch, key: jax.Array, weight: jax.Array | float = 1.0
    ) -> tuple[jax.Array, Metrics]:
        variables = {"params": {part: tree for part, tree in params.items() if part != CELL_HEAD}}
        rngs = {"reduce": key, "connect": key}
        hidden, sown = model.apply(variables, batch, deterministic=False, rngs=rngs, mutable=[LOSSES], method="hidden")
        head = cast(HeadKernel, model.apply(variables, method="head_kernel"))
        shape = (*batch.tokens.shape, head.kernel.shape[head.vocab_axis])
        found = head_cross_entropy(
            cast(jax.Array, hidden),
            head.kernel,
            cast(Any, batch.targets),
            cast(Any, batch.loss_weights),
            blocks=Blocks(head.vocab_axis, *block_of_vocabulary(shape, logits_bytes), head.dtype),
            z_loss=z_loss,
        )
        auxiliary = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sown))
        padding = jnp.mean(batch.segment_ids == PADDING_SEGMENT, dtype=jnp.float32)
        metrics = {"accuracy": weight * found.accuracy, "padding_share": padding}
        if z_loss:
            metrics["z_loss"] = weight * found.z_loss
        if sown:
            metrics["auxiliary_loss"] = jnp.asarray(auxiliary)
        return weight * found.value + auxiliary, metrics

    return loss


def block_of_vocabulary(shape: tuple[int, int, int], logits_bytes: int | None) -> tuple[int, int]:
    """Ids of a block for which a device's float32 logits stay within a bound, and devices that share the vocabulary.

    Blocks are as equal as possible.

    Args:
      shape: B, T and V of all logits; a device's share of each is that of the current mesh.
      logits_bytes: the bound, with at least one id in a block; None for `LOGITS_BYTES`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = partition_spec((axes.BATCH, axes.LENGTH, axes.VOCAB), shape, mesh) if mesh.shape else (None, None, None)
    shards = [math.prod(mesh.shape[axis] for axis in _mesh_axes(entry)) for entry in spec]
    rows, length, ids = (size // count for size, count in zip(shape, shards, strict=True))
    per_id = 4 * rows * length
    most = max(MIN_IDS, LOGITS_BYTES // per_id) if logits_bytes is None else max(1, logits_bytes // per_id)
    num_blocks = -(-ids // most)
    return -(-ids // num_blocks), shards[2]


def _mesh_axes(entry: MeshAxes) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def read_cells(experiment: Experiment) -> Objective:
    """Class and box of every cell of a page: dense supervision of the encoder.

    Source: cross entropy and 5 times L1 as in Carion et al. 2020 (DETR), section 3.1, without
    the matching, since every cell has a target.
    """
    return _read_cells(cast(Any, experiment.cell_reader))  # set where a stage has this objective


@functools.lru_cache(maxsize=64)
def _read_cells(reader: CellReader) -> Objective:
    def loss(
        params: Params, batch: CellBatch, key: jax.Array, weight: jax.Array | float = 1.0
    ) -> tuple[jax.Array, Metrics]:
        del key, weight  # every row has as many cells
        variables = {"params": {"encoder": params["encoder"], **params["cell_head"]}}
        logits, boxes = reader.apply(variables, batch.images[:, 0])
        classes = jnp.broadcast_to(batch.classes[..., None], logits.shape[:-1])
        value, accuracy = cross_entropy(logits, classes, jnp.ones(classes.shape))
        distance = jnp.abs(boxes - batch.boxes[..., None, :]).sum(-1).mean()
        return value + BOX_WEIGHT * distance, {"accuracy": accuracy, "box_l1": distance}

    return loss


# Objective of a stage -> what makes it from the experiment, with the stage's settings of it.
OBJECTIVES: dict[str, Callable[[Experiment, Stage], Objective]] = {
    "next_token": lambda experiment, stage: next_token(experiment, stage.z_loss, stage.logits_bytes),
    "read_cells": lambda experiment, stage: read_cells(experiment),
}

"""Training objectives, with one signature.

An objective is called with the parameters of all parts, a batch of its stream,
and a random key; it returns the loss and named scalar metrics. A last argument `weight` is for a microbatch:
its learned tokens relative to the mean of the step's microbatches. Means over tokens are multiplied by it, so
that the plain mean over microbatches of the loss and of each metric is that of the whole batch.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.build import CELL_HEAD, Experiment
from vlm_jax.layers.scan import LOSSES
from vlm_jax.losses.cross_entropy import cross_entropy
from vlm_jax.models.cell_reader import CellReader
from vlm_jax.types import PADDING_SEGMENT, Batch, CellBatch, Params

Metrics = dict[str, jax.Array]
Objective = Callable[..., tuple[jax.Array, Metrics]]  # (params, batch, key, weight=1.0)

BOX_WEIGHT = 5.0  # weight of the boxes' L1 relative to the classes' cross entropy, as in DETR


def next_token(experiment: Experiment) -> Objective:
    """Cross entropy of the answers' tokens, given images (or only text) and questions.

    What modules sow into the collection `losses`, such as a router's balance loss, is added to it. The metric
    `padding_share` is the share of the rows' positions that are padding.
    """
    return _next_token(experiment.system.model)


@functools.lru_cache(maxsize=64)  # equal objectives are one object, so that equal steps are compiled once
def _next_token(model: nn.Module) -> Objective:
    def loss(
        params: Params, batch: Batch, key: jax.Array, weight: jax.Array | float = 1.0
    ) -> tuple[jax.Array, Metrics]:
        parts = {part: tree for part, tree in params.items() if part != CELL_HEAD}
        rngs = {"reduce": key, "connect": key}
        logits, sown = model.apply({"params": parts}, batch, deterministic=False, rngs=rngs, mutable=[LOSSES])
        value, accuracy = cross_entropy(
            cast(jax.Array, logits), cast(Any, batch.targets), cast(Any, batch.loss_weights)
        )
        value, accuracy = weight * value, weight * accuracy
        auxiliary = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sown))
        padding = jnp.mean(batch.segment_ids == PADDING_SEGMENT, dtype=jnp.float32)
        metrics = {"accuracy": accuracy, "padding_share": padding}
        if sown:
            metrics["auxiliary_loss"] = jnp.asarray(auxiliary)
        return value + auxiliary, metrics

    return loss


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


OBJECTIVES: dict[str, Callable[[Experiment], Objective]] = {"next_token": next_token, "read_cells": read_cells}

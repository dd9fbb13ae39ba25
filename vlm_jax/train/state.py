"""The state of a run and its sharding."""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from vlm_jax.leaves import joined, split
from vlm_jax.train.guard import Recent, first_recent
from vlm_jax.types import Array, Fields, Tree, struct

Params = Fields  # {part: its parameters}


@struct
class TrainState:
    """Attributes:
    step: steps since the start of the run, over all stages.
    params: parameters by part: encoder, connector, decoder and any pre-training head.
    opt_state: the current stage's optimizer state, only of its trained parameters.
    reference: frozen parameters that the current stage's objective needs beside these; None without any.
    ema: moving average of the stage's trained parameters, from their values at its start; None without `optimizer.ema`.
    recent: losses and gradient norms of the stage's last steps.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Tree
    reference: Params | None = None
    ema: Params | None = None
    recent: Recent = dataclasses.field(default_factory=first_recent)

    @property
    def averaged(self) -> Params:
        """The parameters, averages in place of those that have one."""
        return self.params if self.ema is None else joined(self.params, self.ema)


def init_boxed(
    boxed_params: Params,
    tx: optax.GradientTransformation,
    trained: Collection[str],
    reference: Params | None = None,
    *,
    ema: bool = False,
) -> TrainState:
    """A state whose leaves keep their logical axis names, for tracing shapes and shardings.

    Args:
      boxed_params: parameters, or their shapes.
      tx: optimizer of the trained parameters.
      trained: their paths.
      reference: of the stage's objective.
      ema: whether the state has their moving average.
    """
    own = split(boxed_params, trained)[0]
    average = jax.tree.map(jnp.copy, own) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), boxed_params, tx.init(own), reference, average)

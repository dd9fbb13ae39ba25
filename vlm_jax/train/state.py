"""The state of a run and its sharding."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Int

from vlm_jax.sharding.rules import shardings
from vlm_jax.train.guard import Recent, first_recent
from vlm_jax.types import Array, Fields, Tree, struct

Params = Fields  # {part: its parameters}


@struct
class TrainState:
    """Attributes:
    step: steps since the start of the run, over all stages.
    params: parameters by part: encoder, connector, decoder and any pre-training head.
    opt_state: the current stage's optimizer state, only of its trained parts.
    recent: losses and gradient norms of the stage's last steps.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Tree
    recent: Recent = dataclasses.field(default_factory=first_recent)


def split(params: Params, trained: tuple[str, ...]) -> tuple[Params, Params]:
    """(trained parts, frozen parts)."""
    return (
        {part: params[part] for part in trained},
        {part: tree for part, tree in params.items() if part not in trained},
    )


def init_boxed(boxed_params: Params, tx: optax.GradientTransformation, trained: tuple[str, ...]) -> TrainState:
    """A state whose leaves keep their logical axis names, for tracing shapes and shardings."""
    return TrainState(jnp.zeros((), jnp.int32), boxed_params, tx.init(split(boxed_params, trained)[0]))


def abstract(boxed: Tree, mesh: Mesh) -> Tree:
    """Shape, dtype and sharding of every leaf of a boxed tree of shapes."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings(boxed, mesh),
    )

"""The state of a run and its sharding."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Int

from vlm_jax.leaves import split
from vlm_jax.sharding.rules import shardings
from vlm_jax.types import Array, Fields, Tree, struct

Params = Fields  # {part: its parameters}


@struct
class TrainState:
    """Attributes:
    step: steps since the start of the run, over all stages.
    params: parameters by part: encoder, connector, decoder and any pre-training head.
    opt_state: the current stage's optimizer state, only of its trained parameters.
    reference: frozen parameters that the current stage's objective needs beside these; None without any.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Tree
    reference: Params | None = None


def init_boxed(
    boxed_params: Params,
    tx: optax.GradientTransformation,
    trained: Collection[str],
    reference: Params | None = None,
) -> TrainState:
    """A state whose leaves keep their logical axis names, for tracing shapes and shardings; `trained` are paths."""
    return TrainState(jnp.zeros((), jnp.int32), boxed_params, tx.init(split(boxed_params, trained)[0]), reference)


def abstract(boxed: Tree, mesh: Mesh) -> Tree:
    """Shape, dtype and sharding of every leaf of a boxed tree of shapes."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings(boxed, mesh),
    )

"""One optimizer step, compiled over the mesh."""

import functools
from collections.abc import Hashable
from typing import Any, cast

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.sharding.rules import use_mesh
from vlm_jax.train.objectives import Metrics, Objective
from vlm_jax.train.state import TrainState, split
from vlm_jax.types import Params, Tree


def train_step(
    state: TrainState,
    batch: Tree,
    key: jax.Array,
    *,
    objective: Objective,
    tx: optax.GradientTransformation,
    trained: tuple[str, ...],
) -> tuple[TrainState, Metrics]:
    """Computes the gradient of the trained parts and updates the state.

    The step's random key is folded from the run's key and the step, so that a step can be
    repeated. No gradient is computed for frozen parts.
    """
    params, frozen = split(state.params, trained)
    key = jax.random.fold_in(key, state.step)

    def loss_of(params: Params) -> tuple[jax.Array, Metrics]:
        return objective({**frozen, **params}, batch, key)

    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    params: Tree = optax.apply_updates(params, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
    return TrainState(state.step + 1, {**frozen, **params}, opt_state), metrics


def compile_step(
    abstract_state: TrainState,
    batch: Tree,
    mesh: Mesh,
    *,
    objective: Objective,
    tx: optax.GradientTransformation,
    trained: tuple[str, ...],
) -> jax.stages.Compiled:
    """Compiles `train_step` for the shapes and shardings of a state and a batch; donates the state.

    Runs with the same objective and optimizer, such as a sweep's seeds or a run that is resumed, share the program.
    """
    out, structure = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, abstract_state))
    with use_mesh(mesh):
        jitted = _jitted(objective, tx, trained, mesh, tuple(out), structure)
        return jitted.lower(abstract_state, batch, jax.random.key(0)).compile()


@functools.lru_cache(maxsize=16)
def _jitted(
    objective: Objective,
    tx: optax.GradientTransformation,
    trained: tuple[str, ...],
    mesh: Mesh,
    out: tuple[NamedSharding, ...],
    structure: Hashable,
) -> Any:
    def step(state, batch, key):
        return train_step(state, batch, key, objective=objective, tx=tx, trained=trained)

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.unflatten(cast(Any, structure), out), replicated))


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that one device needs for a compiled program: arguments, results and temporaries."""
    memory: Any = compiled.memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )

"""One optimizer step, compiled over the mesh."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.adapter import NO_LORA, LoraSettings, adapted
from vlm_jax.layers import mesh_axes
from vlm_jax.leaves import joined, split
from vlm_jax.sharding.rules import BATCH_AXES, use_mesh
from vlm_jax.train.guard import Bounds, judged
from vlm_jax.train.objectives.objective import Loss, Metrics
from vlm_jax.train.state import TrainState
from vlm_jax.types import Batch, Params, Tree

NO_BOUNDS = Bounds()
Gradient = Callable[[Tree, jax.Array, jax.Array | float], tuple[tuple[jax.Array, Metrics], Tree]]


def train_step(
    state: TrainState,
    batch: Tree,
    key: jax.Array,
    *,
    objective: Loss,
    tx: optax.GradientTransformation,
    trained: frozenset[str],
    accumulate: int = 1,
    lora: LoraSettings = NO_LORA,
    ema: float | None = None,
    bounds: Bounds = NO_BOUNDS,
    mesh: Mesh | None = None,
) -> tuple[TrainState, Metrics]:
    """Computes the gradient of the trained parameters and updates the state; a step that is not good only counts.

    The step's random key is folded from the run's key and the step, so that a step can be
    repeated. No gradient is computed for frozen parameters.

    Args:
      state: donated by the compiled step.
      batch: rows of the objective's stream.
      key: of the run.
      objective: the loss of an objective of `train.objectives.OBJECTIVES`.
      tx: optimizer of the trained parameters.
      trained: paths of the trained parameters.
      accumulate: microbatches into which the batch is split; see `Stage.accumulate`.
      lora: of the state's adapters.
      ema: decay of the moving average of the trained parameters; None for none.
      bounds: of spikes; a loss or a gradient that is not finite is never a good step. The metric `skipped` is the
        number of steps in a row, up to this one, that were not good.
      mesh: devices over which the rows of the batch are divided; None for one.
    """
    params, frozen = split(state.params, trained)
    key = jax.random.fold_in(key, state.step)

    def gradient(batch: Tree, key: jax.Array, weight: jax.Array | float) -> tuple[tuple[jax.Array, Metrics], Tree]:
        def loss_of(params: Params) -> tuple[jax.Array, Metrics]:
            given = adapted(joined(frozen, params), lora, key)
            reference = None if state.reference is None else adapted(state.reference, lora)
            return objective(given, batch, key, weight, reference)

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    if accumulate == 1:
        (loss, metrics), grads = gradient(batch, key, 1.0)
    else:
        (loss, metrics), grads = _accumulated(gradient, params, microbatches(batch, accumulate, mesh), key)
    grad_norm = optax.tree.norm(grads)
    good, recent = judged(state.recent, loss, grad_norm, bounds)

    def updated(before: Tree) -> Tree:
        params, opt_state, average = before
        updates, opt_state = tx.update(grads, opt_state, params)
        params: Tree = optax.apply_updates(params, updates)
        if ema is not None:
            average = optax.incremental_update(params, average, 1 - ema)
        return params, opt_state, average

    # A branch, since a choice between the leaves of two states would need room for both.
    before = params, state.opt_state, state.ema
    params, opt_state, average = jax.lax.cond(good, updated, lambda before: before, before)
    metrics = {"loss": loss, "grad_norm": grad_norm, "skipped": recent.skipped, **metrics}
    changed = {"params": joined(frozen, params), "opt_state": opt_state, "ema": average, "recent": recent}
    return dataclasses.replace(state, step=state.step + 1, **changed), metrics


def microbatches(batch: Tree, count: int, mesh: Mesh | None) -> Tree:
    """A batch with a leading axis of `count` microbatches; every device keeps its own rows.

    Args:
      batch: leaves [B, ...], or [k B, ...] with k elements of each row together; the mesh's shards of the batch
        times `count` divide B.
      count: number of microbatches.
      mesh: devices over which B is divided; None for one.
    """
    shards = 1 if mesh is None else num_shards(mesh)

    def cut(leaf: jax.Array) -> jax.Array:
        size = len(leaf) // (shards * count)
        rows = leaf.reshape(shards, count, size, *leaf.shape[1:]).swapaxes(0, 1)
        rows = rows.reshape(count, shards * size, *leaf.shape[1:])
        if mesh is None:
            return rows
        return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))

    return jax.tree.map(cut, batch)


def num_shards(mesh: Mesh) -> int:
    """Parts of equally many rows into which a batch is divided over the devices."""
    return mesh_axes.num_shards(BATCH_AXES, mesh)


def _accumulated(
    gradient: Gradient, params: Params, batches: Tree, key: jax.Array
) -> tuple[tuple[jax.Array, Metrics], Tree]:
    """The loss, metrics and float32 gradients of the whole batch, from those of its microbatches."""
    count = len(jax.tree.leaves(batches)[0])
    weights = jnp.ones(count)
    if isinstance(batches, Batch):
        learned = cast(jax.Array, batches.loss_weights).sum(axis=(1, 2))
        weights = learned * count / jnp.maximum(learned.sum(), 1e-6)

    def add(total: Tree, given: tuple[jax.Array, Tree, jax.Array]) -> tuple[Tree, tuple[jax.Array, Metrics]]:
        number, batch, weight = given
        value, grads = gradient(batch, jax.random.fold_in(key, number), weight)
        return jax.tree.map(lambda one, other: one + other.astype(jnp.float32), total, grads), value

    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)
    total, values = jax.lax.scan(add, zeros, (jnp.arange(count), batches, weights))
    value = jax.tree.map(lambda leaf: leaf.mean(axis=0), values)
    return value, jax.tree.map(lambda leaf: leaf / count, total)


def compile_step(abstract_state: TrainState, batch: Tree, mesh: Mesh, **settings: Any) -> jax.stages.Compiled:
    """Compiles `train_step` for the shapes and shardings of a state and a batch; arguments as of `trace_step`."""
    with use_mesh(mesh):
        return trace_step(abstract_state, batch, mesh, **settings).lower().compile()


# Products are not divided into parts that wait for a neighbour's part of a kernel ("windowed einsum"). The parts are
# narrow: with them the step of Qwen2.5-VL 3B on v5e:4x4 is predicted to take 1.6 times as long.
TPU_OPTIONS: dict[str, bool | str] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def trace_step(
    abstract_state: TrainState,
    batch: Tree,
    mesh: Mesh,
    *,
    objective: Loss,
    tx: optax.GradientTransformation,
    trained: frozenset[str],
    accumulate: int = 1,
    lora: LoraSettings = NO_LORA,
    ema: float | None = None,
    bounds: Bounds = NO_BOUNDS,
) -> jax.stages.Traced:
    """Traces `train_step` for the shapes and shardings of a state and a batch; donates the state.

    Runs with the same objective and optimizer, such as a sweep's seeds or a run that is resumed, share the program.

    Args:
      abstract_state: as of `StageStep.abstract_state`.
      batch: arrays, or shapes with shardings.
      mesh: devices, which need not be of this machine.
      objective, tx, trained, accumulate, lora, ema, bounds: as of `train_step`.
    """
    out, structure = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, abstract_state))
    key = jax.eval_shape(lambda: jax.random.key(0))  # an array would need the devices of the mesh
    with use_mesh(mesh):
        jitted = _jitted(objective, tx, trained, accumulate, lora, ema, bounds, mesh, tuple(out), structure)
        return jitted.trace(abstract_state, batch, key.update(sharding=NamedSharding(mesh, PartitionSpec())))


@functools.lru_cache(maxsize=16)
def _jitted(
    objective: Loss,
    tx: optax.GradientTransformation,
    trained: frozenset[str],
    accumulate: int,
    lora: LoraSettings,
    ema: float | None,
    bounds: Bounds,
    mesh: Mesh,
    out: tuple[NamedSharding, ...],
    structure: Hashable,
) -> Any:
    def step(state, batch, key):
        settings: Any = {"objective": objective, "tx": tx, "trained": trained, "accumulate": accumulate}
        return train_step(state, batch, key, **settings, lora=lora, ema=ema, bounds=bounds, mesh=mesh)

    shardings = jax.tree.unflatten(cast(Any, structure), out), NamedSharding(mesh, PartitionSpec())
    options = TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None
    return jax.jit(step, donate_argnums=0, out_shardings=shardings, compiler_options=options)


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that one device needs for a compiled program: arguments, results and temporaries."""
    memory: Any = compiled.memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )

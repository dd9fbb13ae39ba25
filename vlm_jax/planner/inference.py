"""Prefill and decoding of a model that answers, traced for a slice on abstract values."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.build import AnyExperiment, Experiment
from vlm_jax.config import ConfigError, RunConfig
from vlm_jax.costs.flops import count_flops
from vlm_jax.generation.engine import cache_shardings
from vlm_jax.models.vlm import VLM
from vlm_jax.planner.plan import Work
from vlm_jax.planner.settings import details, visible_share
from vlm_jax.planner.training import abstract_batch
from vlm_jax.sharding.rules import BATCH_AXES, placed, use_mesh
from vlm_jax.train.step import num_shards
from vlm_jax.types import Batch, Params, Tree

CACHE_DTYPE = jnp.bfloat16


def inference_work(
    config: RunConfig, experiment: AnyExperiment, mesh: Mesh, *, stage: str, batch_size: int, context: int | None
) -> Work:
    """A step of generation: the prompts of a batch, or one more token for each of its rows.

    Args:
      config: with all keys; a prompt has the positions and pictures of `config.row`.
      experiment: of the config.
      mesh: of a topology's devices.
      stage: `prefill` or `decode`.
      batch_size: prompts, over all devices.
      context: slots of the cache for every row, all of which are read in decoding; at least the prompt's length. None
        for that and a quarter of it.

    Raises:
      ConfigError: the model generates no text, or sizes that do not fit.
    """
    model, shards = experiment.system.model, num_shards(mesh)
    if not isinstance(experiment, Experiment) or not isinstance(model, VLM) or model.decoder is None:
        raise ConfigError(f"--stage={stage}: a {type(model).__name__} generates no text; plan --stage=train")
    length = experiment.row.length
    context = length + length // 4 if context is None else context
    if context < length:
        raise ConfigError(f"--context: expected at least the prompt's {length} positions, got {context}")
    if batch_size % shards:
        raise ConfigError(
            f"--batch_size: {batch_size} prompts cannot be divided over {shards} shards (data times fsdp of "
            f"config.mesh); set a multiple of {shards}, or more of tensor"
        )
    params = inference_params(experiment, mesh)
    prompts = abstract_batch(_prompt(experiment), batch_size, mesh)
    with use_mesh(mesh):
        cache = _abstract_cache(model, params, prompts, context, mesh)
    arguments: dict[str, Tree] = {f"parameters of {part}": tree for part, tree in params.items()}
    step: Callable[..., Tree]
    if stage == "prefill":
        step, donated = functools.partial(_prefill, model, context, mesh), ()
        given, positions = ({"params": params}, prompts), batch_size * length
        arguments["batch"] = prompts
    else:
        rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        shape = (batch_size, 1)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
        position = jax.ShapeDtypeStruct((*shape, *prompts.positions.shape[2:]), jnp.int32, sharding=rows)
        step, donated = functools.partial(_decode, model), (3,)
        given, positions = ({"params": params}, tokens, position, cache), batch_size
        arguments["cache"] = cache
    with use_mesh(mesh):
        traced = jax.jit(step, donate_argnums=donated).trace(*given)
        flops = count_flops(step, *given)
    more: Any = {"batch_size": batch_size, "context": context, "cache_dtype": str(jnp.dtype(CACHE_DTYPE))}
    return Work(
        stage=stage,
        traced=traced,
        mesh=mesh,
        arguments=arguments,
        model_flops=flops,
        rows=batch_size,
        tokens=positions,
        visible=visible_share(model, length),
        details={**details(config, experiment), **more},
    )


def _prefill(model: VLM, context: int, mesh: Mesh, variables: Params, batch: Batch) -> Tree:
    logits, cache = model.apply(variables, batch, context, CACHE_DTYPE, method="prefill")
    return logits, jax.tree.map(jax.lax.with_sharding_constraint, cache, cache_shardings(cast(Any, cache), mesh))


def _decode(model: VLM, variables: Params, tokens: Tree, position: Tree, cache: Tree) -> Tree:
    """The likeliest next token of every row."""
    logits, cache = model.apply(variables, tokens, position, cache, method="extend")
    return jnp.argmax(cast(Any, logits), axis=-1), cache


def inference_params(experiment: Experiment, mesh: Mesh) -> Params:
    """Shapes of the parameters in the dtype of the computation, as they are loaded for generation."""
    model: Any = experiment.system.model
    dtype = model.decoder.dtype

    def loaded(leaf: Any) -> Any:
        floats = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.update(dtype=dtype) if floats else leaf

    return jax.tree.map(loaded, placed(experiment.system.boxed_shapes(), mesh))


def _prompt(experiment: Experiment) -> Batch:
    row = experiment.system.example(experiment.row)
    return dataclasses.replace(row, targets=None, loss_weights=None, branch_ids=None)


def _abstract_cache(model: VLM, params: Params, prompts: Batch, context: int, mesh: Mesh) -> Tree:
    """Shapes and shardings of the cache after the prompts."""

    def written(params: Params, prompts: Batch) -> Tree:
        return model.apply({"params": params}, prompts, context, CACHE_DTYPE, method="prefill")[1]

    cache: Any = jax.eval_shape(written, params, prompts)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        cache,
        cache_shardings(cache, mesh),
    )

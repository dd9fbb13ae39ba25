"""The training step of a config, traced for a slice on abstract values."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.build import AnyExperiment
from vlm_jax.config import RunConfig, parse
from vlm_jax.optim.adamw import OptimizerSettings
from vlm_jax.planner.plan import Work
from vlm_jax.planner.settings import details, visible_share
from vlm_jax.sharding.rules import BATCH_AXES
from vlm_jax.train.settings import LoopSettings
from vlm_jax.train.stage_step import StageStep
from vlm_jax.train.stages import check_stages, parse_schedule
from vlm_jax.train.step import num_shards, trace_step
from vlm_jax.train.watch import step_flops
from vlm_jax.types import Batch, Fields, Tree


def training_work(config: RunConfig, experiment: AnyExperiment, mesh: Mesh) -> Work:
    """The step of the last stage of a config, as `train.loop.Trainer` compiles it.

    Args:
      config: with all keys.
      experiment: of the config.
      mesh: of a topology's devices.

    Raises:
      ConfigError: a stage that does not suit the model or the mesh, or an objective without abstract batches.
    """
    spans = parse_schedule(tuple(config.schedule), config.stages)
    check_stages(spans, experiment, num_shards(mesh))
    stage = spans[-1].stage
    loop = parse(LoopSettings, config.loop, "config.loop")
    optimizer = parse(OptimizerSettings, config.optimizer, "config.optimizer")
    step = StageStep(experiment, stage, optimizer, loop.bounds, mesh)
    state, settings = step.abstract_state(), step.settings
    batch = abstract_batch(stage.settings.example(experiment, stage.stream), stage.batch_size, mesh)
    traced = trace_step(state, batch, mesh, **settings)
    flops = step_flops(settings["objective"], state, batch, settings["trained"], experiment.lora)
    rows: Any = batch.tokens.shape if isinstance(batch, Batch) else (stage.batch_size, 1)
    arguments = {f"parameters of {part}": tree for part, tree in state.params.items()}
    arguments |= {"optimizer": state.opt_state, "average": state.ema, "reference": state.reference, "batch": batch}
    more: Fields = {"stage": stage.label, "batch_size": stage.batch_size, "accumulate": stage.accumulate}
    more["trained"] = sorted({path.split("/")[0] for path in step.trained})
    return Work(
        stage="train",
        traced=traced,
        mesh=mesh,
        arguments=arguments,
        model_flops=flops,
        rows=rows[0],
        tokens=rows[0] * rows[1],
        visible=visible_share(experiment.system.model, rows[1]),
        details={**details(config, experiment), **more},
    )


def abstract_batch(example: Tree, batch_size: int, mesh: Mesh) -> Tree:
    """Shapes of a batch over the mesh.

    Args:
      example: shapes of a batch of one.
      batch_size: of the batch.
      mesh: whose data axes divide the rows.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def of(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size * leaf.shape[0], *leaf.shape[1:]), leaf.dtype, sharding=sharding)

    return jax.tree.map(of, example)

"""Stages of a run: their objective, stream and trained parameters."""

import dataclasses

from vlm_jax.build import AnyExperiment
from vlm_jax.config import ConfigError, RunConfig, check_keys, choose, did_you_mean, parse
from vlm_jax.ranges import Count, Natural, NonNegative, PositiveShare, Size
from vlm_jax.train.objectives import OBJECTIVES
from vlm_jax.train.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage; parameters without a learning rate are frozen in it.

    Further keys are those of its objective.

    Attributes:
      label: the stage's key under `config.stages`.
      settings: those of the objective, from its keys.
      objective: a name of `train.objectives.OBJECTIVES`.
      stream: a stream of the data source.
      steps: optimizer steps.
      batch_size: examples per step, over all devices.
      accumulate: equal parts of the batch that are computed one after another, in the memory of one; their gradients
        are added. Losses and updates are those of the whole batch, each learned token having the same weight, but for
        random draws, which each part makes of its own, and routers whose balance loss is over a batch.
      learning_rates: peak learning rate by pattern of parameter paths: a part or a module ("decoder"; all in it), or
        one with wildcards ("encoder/blocks/*", "decoder/*norm/scale"), where `*` may stand for any characters. The
        pattern with the most other characters takes precedence. 0 freezes, and so does no pattern; the log counts both.
      layer_decay: factor of the rates from each layer to the one before it, by part or module; see
        `optim.patterns.leaf_rates`.
      warmup_steps: linear warm-up, part of `steps`.
    """

    label: str
    settings: Objective
    objective: str
    stream: str
    steps: Count
    batch_size: Size
    learning_rates: dict[str, NonNegative]
    warmup_steps: Natural
    layer_decay: dict[str, PositiveShare] = dataclasses.field(default_factory=dict)
    accumulate: Size = 1


@dataclasses.dataclass(frozen=True)
class Span:
    """A stage and its steps in the run: `start` <= step < `stop`."""

    stage: Stage
    start: int
    stop: int


def parse_schedule(schedule: tuple[str, ...], stages: RunConfig) -> tuple[Span, ...]:
    """The stages in the order of `config.schedule`, with the steps of each.

    Args:
      schedule: keys of `stages`, each once.
      stages: `config.stages`; a stage that is not in the schedule is an error.

    Raises:
      ConfigError: a stage that does not exist, is repeated, or is not in the schedule.
    """
    for label in schedule:
        if label not in stages:
            raise ConfigError(f"config.schedule: no stage '{label}' under config.stages{did_you_mean(label, stages)}")
    if len(set(schedule)) != len(schedule) or not schedule:
        raise ConfigError(f"config.schedule: expected at least one stage, each once, got {schedule}")
    check_keys(stages, schedule, "config.stages")
    spans, start = [], 0
    for label in schedule:
        path = f"config.stages.{label}"
        stage = _stage(stages[label], label, path)
        if stage.batch_size % stage.accumulate:
            raise ConfigError(
                f"{path}.accumulate: expected a divisor of the batch_size of {stage.batch_size}, got {stage.accumulate}"
            )
        if stage.warmup_steps >= stage.steps:
            raise ConfigError(f"{path}.warmup_steps: expected fewer than {stage.steps} steps, got {stage.warmup_steps}")
        if not any(stage.learning_rates.values()):
            raise ConfigError(f"{path}.learning_rates: expected at least one above 0, got {_rates(stage)}")
        spans.append(Span(stage, start, start + stage.steps))
        start += stage.steps
    return tuple(spans)


def _stage(section: RunConfig, label: str, path: str) -> Stage:
    """The stage of a section, whose keys are those of `Stage` and of its objective's settings."""
    if "objective" not in section:
        raise ConfigError(f"{path}.objective: missing; expected one of {', '.join(OBJECTIVES)}")
    kind = choose(OBJECTIVES, section["objective"], f"{path}.objective")
    shared = {field.name for field in dataclasses.fields(Stage)}
    own = _keys(kind)
    for key in section:
        owners = [name for name, other in OBJECTIVES.items() if key in _keys(other)]
        if owners and key not in own | shared:
            raise ConfigError(f"{path}.{key}: is a key of the objective {' and '.join(owners)}; remove it")
    check_keys(section, (shared | own) - {"label", "settings"}, path)
    try:
        settings = parse(kind, {key: section[key] for key in section if key in own}, path)
    except ConfigError:
        raise
    except ValueError as error:  # of a value outside its range
        raise ConfigError(f"{path}: {error}") from error
    return parse(Stage, {key: section[key] for key in section if key in shared}, path, label=label, settings=settings)


def _keys(kind: type[Objective]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]


def check_stages(spans: tuple[Span, ...], experiment: AnyExperiment, num_shards: int) -> None:
    """Checks that the data has the stages' streams, and that objectives and batches suit the model and the devices.

    Args:
      spans: of the run.
      experiment: the run's.
      num_shards: parts of equally many rows into which a batch is divided over the devices.

    Raises:
      ConfigError: a stage that does not; the message has its path.
    """
    for stage in (span.stage for span in spans):
        path, streams = f"config.stages.{stage.label}", experiment.source.streams
        if stage.stream not in streams:
            raise ConfigError(f"{path}.stream: unknown '{stage.stream}'{did_you_mean(stage.stream, streams)}")
        if stage.stream not in stage.settings.streams:
            raise ConfigError(
                f"{path}.stream: the objective {stage.objective} takes {' or '.join(stage.settings.streams)}, got "
                f"'{stage.stream}'"
            )
        stage.settings.check(experiment, accumulate=stage.accumulate, path=path)
        size = stage.batch_size // stage.accumulate
        if size % num_shards:
            raise ConfigError(
                f"{path}: microbatches of {size} rows (batch_size over accumulate) cannot be divided over {num_shards} "
                f"shards (data times fsdp of config.mesh); set batch_size to a multiple of {num_shards} x accumulate"
            )


def span_at(spans: tuple[Span, ...], step: int) -> Span:
    """The span of `step`; the last one for the step after the end."""
    return next((span for span in spans if step < span.stop), spans[-1])


def _rates(stage: Stage) -> str:
    return ", ".join(f"{pattern}: {rate}" for pattern, rate in stage.learning_rates.items()) or "none"

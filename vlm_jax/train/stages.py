"""Stages of a run: what is learned, from which stream, by which parts of the model."""

import dataclasses

from vlm_jax.config import ConfigError, RunConfig, check_keys, did_you_mean, parse


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage; parts of the model that have no learning rate are frozen in it.

    Attributes:
      label: the stage's key under `config.stages`.
      objective: a name of `train.objectives.OBJECTIVES`.
      stream: which of the data source's streams it reads.
      steps: optimizer steps.
      batch_size: examples a step, over all devices.
      learning_rates: peak learning rate of every part that is trained.
      warmup_steps: linear warm-up, part of `steps`.
    """

    label: str
    objective: str
    stream: str
    steps: int
    batch_size: int
    learning_rates: dict[str, float]
    warmup_steps: int


@dataclasses.dataclass(frozen=True)
class Span:
    """A stage and the run's steps that it covers: `start` <= step < `stop`."""

    stage: Stage
    start: int
    stop: int


def parse_schedule(schedule: tuple[str, ...], stages: RunConfig) -> tuple[Span, ...]:
    """The stages in the order of `config.schedule`, with the steps that each covers.

    Args:
      schedule: keys of `stages`, each once.
      stages: `config.stages`; a stage that the schedule does not name is an unused key.

    Raises:
      ConfigError: a stage that is not there, is repeated, or is never reached.
    """
    for label in schedule:
        if label not in stages:
            raise ConfigError(f"config.schedule: no stage '{label}' under config.stages{did_you_mean(label, stages)}")
    if len(set(schedule)) != len(schedule) or not schedule:
        raise ConfigError(f"config.schedule: wants at least one stage, each once; got {schedule}")
    check_keys(stages, schedule, "config.stages")
    spans, start = [], 0
    for label in schedule:
        stage = parse(Stage, stages[label], f"config.stages.{label}", label=label)
        path = f"config.stages.{label}"
        if stage.steps < 1 or stage.batch_size < 1:
            raise ConfigError(f"{path}: steps and batch_size are at least 1")
        if not 0 <= stage.warmup_steps < stage.steps:
            raise ConfigError(f"{path}.warmup_steps: {stage.warmup_steps} is not shorter than {stage.steps} steps")
        if not stage.learning_rates:
            raise ConfigError(f"{path}.learning_rates: no part is trained; name at least one")
        spans.append(Span(stage, start, start + stage.steps))
        start += stage.steps
    return tuple(spans)


def span_at(spans: tuple[Span, ...], step: int) -> Span:
    """The span that `step` lies in; the last one for the step after the end."""
    return next((span for span in spans if step < span.stop), spans[-1])

"""The training loop: stages, checkpoints, resumption, metrics."""

import contextlib
import dataclasses
import logging
import signal
import statistics
import time
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from vlm_jax.build import Experiment
from vlm_jax.checkpoints.orbax import CHECKPOINTS, RunCheckpoints, parts_directory, read_parts
from vlm_jax.config import ConfigError, RunConfig, did_you_mean, parse
from vlm_jax.data.loader import batch_at
from vlm_jax.optim.adamw import OptimizerSettings, adamw
from vlm_jax.paths import absolute
from vlm_jax.sharding.processes import any_process, is_primary, wait_for_all
from vlm_jax.sharding.rules import distribute, shardings, use_mesh
from vlm_jax.train import replay
from vlm_jax.train.claim import Claim
from vlm_jax.train.guard import GuardSettings
from vlm_jax.train.input import ROWS, rows, stage_batches
from vlm_jax.train.objectives import OBJECTIVES
from vlm_jax.train.replay import REPLAY
from vlm_jax.train.stages import Span, parse_schedule, span_at
from vlm_jax.train.state import Params, TrainState, abstract, init_boxed
from vlm_jax.train.step import compile_step, num_shards, peak_bytes
from vlm_jax.train.workdir import MetricsLog
from vlm_jax.types import Fields, Tree

_log = logging.getLogger(__name__)

Progress = Callable[[int, int, Fields], None]  # (step, steps in all, the step's metrics)


class Interrupted(Exception):
    """The run was stopped by SIGTERM; everything is saved, and rerunning the command resumes."""


class Diverged(RuntimeError):
    """The loss or a gradient is not finite, or is a spike; the message names the step."""


@dataclasses.dataclass(frozen=True)
class LoopSettings(GuardSettings):
    """`config.loop`; further keys are those of `guard.GuardSettings`.

    Attributes:
      save_every: steps between checkpoints; one is also saved at the end of every stage.
      keep: number of newest checkpoints to keep.
      log_every: steps between writes of `metrics.jsonl`, which has one line per step.
      input_workers: processes that load batches; 0 uses a thread of the loop's process. There are
        enough if `input_seconds` in `metrics.jsonl`, the time for which devices waited for a batch, is about 0.
    """

    save_every: int = 200
    keep: int = 2
    log_every: int = 20
    input_workers: int = 0

    def __post_init__(self):
        super().__post_init__()
        for key in ("save_every", "keep", "log_every"):
            if getattr(self, key) < 1:
                raise ConfigError(f"config.loop.{key}: expected at least 1, got {getattr(self, key)}")
        if self.input_workers < 0:
            raise ConfigError(f"config.loop.input_workers: expected 0 or more, got {self.input_workers}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a finished run.

    Attributes:
      params: parameters by part, on the mesh.
      step_seconds: median seconds of a step of the last stage, its input included; None without a stage.
      peak_bytes: bytes that one device needs for a step of the last stage; None likewise.
    """

    params: Params
    step_seconds: float | None
    peak_bytes: int | None


def is_done(metrics: Tree) -> bool:
    """Whether the step that returns `metrics` is finished; True for None, before the first step."""
    return all(value.is_ready() for value in jax.tree.leaves(metrics))


def first_params(
    experiment: Experiment, mesh: Mesh, seed: int, init_from: epath.PathLike | None, init_parts: Sequence[str]
) -> Params:
    """Parameters on their devices: read from the run that this one starts from, or the release, or drawn.

    Args:
      experiment: what has them.
      mesh: devices.
      seed: of the draws.
      init_from, init_parts: as of `Trainer`.
    """
    read = () if init_from is None else tuple(init_parts)
    params = experiment.initial(jax.random.key(seed), mesh, without=read)
    if init_from is not None:
        shapes = abstract(experiment.boxed_shapes(), mesh)
        params |= read_parts(init_from, {part: shapes[part] for part in read})
    return params


class Trainer:
    """Runs the stages of a config, resuming from its workdir.

    Args:
      config: the run's config; see `configs/base.py`.
      experiment: from `build(config)`.
      mesh: mesh of devices.
      workdir: the run's folder, local or `gs://`.
      init_from: workdir of another run or its folder of checkpoints, or a folder that `cli.convert` wrote,
        from which this run's parts are initialised; None to start from scratch.
      init_parts: the parts to read from there; the others are randomly initialised.
      progress: called after every logged step.

    Raises:
      ConfigError: an invalid stage, or a workdir of another config.
      MalformedRecords: data that cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        experiment: Experiment,
        mesh: Mesh,
        workdir: epath.PathLike,
        *,
        init_from: epath.PathLike | None = None,
        init_parts: tuple[str, ...] = ("encoder", "decoder"),
        progress: Progress = lambda step, steps, metrics: None,
    ):
        self.experiment, self.mesh, self.workdir = experiment, mesh, epath.Path(absolute(workdir))
        self._seed, self._progress = config.seed, progress
        self._init_from = None if init_from is None else parts_directory(init_from)
        self._init_parts = init_parts
        self._settings = parse(LoopSettings, config.loop, "config.loop")
        self._optimizer = parse(OptimizerSettings, config.optimizer, "config.optimizer")
        self._spans = parse_schedule(tuple(config.schedule), config.stages)
        self._boxed = experiment.boxed_shapes()
        self._check_stages()
        experiment.open_source()  # faults of the data are named before weights are read
        last = self._spans[-1].stage.label
        self._claim = Claim(self.workdir, config, init_from=self._init_from, last_stage=last)
        self._stop = False

    @property
    def num_steps(self) -> int:
        """Number of steps of all stages."""
        return self._spans[-1].stop

    def finished(self) -> bool:
        """Whether every step has been run and saved."""
        if not (self.workdir / CHECKPOINTS).exists():
            return False
        checkpoints = RunCheckpoints(self.workdir / CHECKPOINTS, self._settings.keep)
        with contextlib.closing(checkpoints):
            return checkpoints.latest() == self.num_steps

    def run(self) -> Outcome:
        """Trains the remaining steps.

        Raises:
          Interrupted: SIGTERM was received; the state is saved.
          Diverged: a step is not good (`guard.GuardSettings`); the previous checkpoint is kept.
          CheckpointError: a checkpoint cannot be written or read.
          WorkdirInUse: another process runs in the workdir.
        """
        with self._claim.held():
            checkpoints = RunCheckpoints(self.workdir / CHECKPOINTS, self._settings.keep)
            previous = signal.signal(signal.SIGTERM, self._on_sigterm)
            try:
                return self._run(checkpoints)
            finally:
                signal.signal(signal.SIGTERM, previous)
                checkpoints.close()

    def _run(self, checkpoints: RunCheckpoints) -> Outcome:
        step = checkpoints.latest() or 0
        span = span_at(self._spans, step)
        position: Fields = {}
        if checkpoints.latest() is None:
            state = self._first_state(span)
        else:
            state, position = checkpoints.restore(step, self._abstract_state(span))
        log = MetricsLog(self.workdir, step)
        while True:
            state, most_bytes = self._run_stage(span, state, position, log, checkpoints)
            if span is self._spans[-1]:
                break
            span, position = span_at(self._spans, span.stop), {}
            state = self._enter(span, state)
            self._claim.confirm()
            checkpoints.save(span.start, state, position)
        wait_for_all("the last metrics are written")
        lines = log.read()
        seconds = [line["seconds"] for line in lines if line["stage"] == span.stage.label]
        return Outcome(state.params, statistics.median(seconds), most_bytes)

    def _run_stage(self, span: Span, state: TrainState, position, log: MetricsLog, checkpoints: RunCheckpoints):
        """Steps from the state's to the stage's last; returns the state and the most bytes that a step needs."""
        start = position.get("batch", 0)
        with contextlib.closing(self._batches(span, self._settings.input_workers, start=start)) as iterator:
            return self._run_steps(span, state, iterator, log, checkpoints)

    def _run_steps(self, span: Span, state: TrainState, iterator, log: MetricsLog, checkpoints: RunCheckpoints):
        step, waited = int(state.step), 0.0
        if step < span.stop:
            batch, waited = self._next(iterator, None)
        else:
            batch = self._probe_batch(span)
        programs: dict[Hashable, jax.stages.Compiled] = {}
        self._program(span, programs, batch)
        self._claim.record()
        key = jax.random.key(self._seed)
        pending: list[tuple[int, Tree, float]] = []
        since = time.perf_counter()
        while step < span.stop:
            state, metrics = self._program(span, programs, batch)(state, batch, key)
            step += 1
            pending.append((step, metrics, waited))
            last = step == span.stop
            logs = last or step % self._settings.log_every == 0 or step % self._settings.save_every == 0
            if jax.process_count() == 1:
                stops = self._stop
            else:  # processes synchronise when they log, so that they do not wait for each other at every step
                stops = logs and any_process(self._stop)
            due = step % self._settings.save_every == 0 or stops
            if logs or due:
                jax.block_until_ready(metrics)
                self._flush(pending, span, (time.perf_counter() - since) / len(pending), log)
                pending, since = [], time.perf_counter()
            if (due and not last) or (last and span is self._spans[-1]):
                self._claim.confirm()
                checkpoints.save(step, state, {"batch": step - span.start})
                if stops and step < self.num_steps:
                    checkpoints.wait()
                    raise Interrupted(f"stopped by SIGTERM and saved at step {step} of {self.num_steps}")
                since = time.perf_counter()
            if not last:
                batch, waited = self._next(iterator, metrics)
        return state, max(map(peak_bytes, programs.values()))

    def _program(self, span: Span, programs: dict[Hashable, jax.stages.Compiled], batch: Tree) -> jax.stages.Compiled:
        """The stage's program for batches of this structure and shape, compiled into `programs` at the first one."""
        kind = jax.tree.structure(batch), tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if kind not in programs:
            programs[kind] = compile_step(
                self._abstract_state(span),
                batch,
                self.mesh,
                objective=OBJECTIVES[span.stage.objective](self.experiment, span.stage),
                tx=self._tx(span),
                trained=tuple(span.stage.learning_rates),
                accumulate=span.stage.accumulate,
                bounds=self._settings.bounds,
            )
            _log.info("stage %s: %d programs compiled", span.stage.label, len(programs))
        return programs[kind]

    def _next(self, iterator: Iterator[Tree], metrics: Tree) -> tuple[Tree, float]:
        """The next batch on the devices, and an upper bound of the seconds that they were idle for it.

        0 while they run the step of `metrics`; else the time until the batch was ready.
        """
        since = time.perf_counter()
        batch = next(iterator)
        waited = time.perf_counter() - since
        return distribute(batch, self.mesh), waited if is_done(metrics) else 0.0

    def _flush(self, pending: list[tuple[int, Tree, float]], span: Span, seconds: float, log: MetricsLog) -> None:
        lines, label = [], span.stage.label
        for step, metrics, waited in pending:
            values = {name: float(value) for name, value in metrics.items()}
            lines.append({"step": step, "stage": label, **values, "seconds": seconds, "input_seconds": waited})
            if values["skipped"]:
                self._keep_for_replay(span, step)
            if self._settings.ends_at(int(values["skipped"])):
                log.append(lines)
                raise Diverged(
                    f"the loss is {values['loss']} and the norm of the gradient {values['grad_norm']} at step {step} "
                    f"(stage {label}), not finite or a spike; lower the stage's learning_rates or clip_norm in a new "
                    "run, or go on without such steps by config.loop.on_nonfinite=skip. The newest checkpoint is "
                    f"from before this step, and its batch in {self.workdir / REPLAY}"
                )
        log.append(lines)
        self._progress(lines[-1]["step"], self.num_steps, lines[-1])

    def _first_state(self, span: Span) -> TrainState:
        params = first_params(self.experiment, self.mesh, self._seed, self._init_from, self._init_parts)
        return self._enter(span, TrainState(np.zeros((), np.int32), params, None))

    def _enter(self, span: Span, state: TrainState) -> TrainState:
        """The state at the start of a stage: the same parameters, a fresh optimizer."""
        like = self._abstract_state(span)
        out = jax.tree.map(lambda leaf: leaf.sharding, like)
        tx, trained = self._tx(span), tuple(span.stage.learning_rates)

        def fresh(step, params):
            return dataclasses.replace(init_boxed(params, tx, trained), step=step)

        with use_mesh(self.mesh):
            return jax.jit(fresh, out_shardings=out, donate_argnums=1)(np.full((), span.start, np.int32), state.params)

    def _abstract_state(self, span: Span) -> TrainState:
        tx, trained = self._tx(span), tuple(span.stage.learning_rates)
        return abstract(jax.eval_shape(lambda params: init_boxed(params, tx, trained), self._boxed), self.mesh)

    def _param_shardings(self) -> Tree:
        return shardings(self._boxed, self.mesh)

    def _tx(self, span: Span):
        stage = span.stage
        return adamw(self._optimizer, stage.learning_rates, stage.warmup_steps, stage.steps)

    def _probe_batch(self, span: Span) -> Tree:
        """A batch to compile for when the stage has no step left."""
        with contextlib.closing(self._batches(span)) as iterator:
            return distribute(next(iterator), self.mesh)

    def _batches(self, span: Span, num_workers: int = 0, *, start: int = 0) -> Any:
        more: Any = {"num_workers": num_workers, "folder": self.workdir / ROWS, "start": start}
        return stage_batches(self.experiment, span.stage, self._seed, **more)

    def _keep_for_replay(self, span: Span, step: int) -> None:
        """Makes the batch of a step again, and writes it."""
        if is_primary():
            made = rows(self.experiment, span.stage, self._seed, folder=self.workdir / ROWS)
            batch = batch_at(made, span.stage.batch_size, step - 1 - span.start)
            replay.write(self.workdir, step, batch, self._seed)

    def _check_stages(self) -> None:
        for span in self._spans:
            stage, path = span.stage, f"config.stages.{span.stage.label}"
            if stage.objective not in OBJECTIVES:
                raise ConfigError(
                    f"{path}.objective: unknown '{stage.objective}'{did_you_mean(stage.objective, OBJECTIVES)}"
                )
            if stage.stream not in self.experiment.source.streams:
                streams = self.experiment.source.streams
                raise ConfigError(f"{path}.stream: unknown '{stage.stream}'{did_you_mean(stage.stream, streams)}")
            if (stage.stream == "cells") != (stage.objective == "read_cells"):
                raise ConfigError(f"{path}: the objective read_cells requires the stream cells, and vice versa")
            size, shards = stage.batch_size // stage.accumulate, num_shards(self.mesh)
            if size % shards:
                raise ConfigError(
                    f"{path}: microbatches of {size} rows (batch_size over accumulate) cannot be divided over {shards} "
                    f"shards (data times fsdp of config.mesh); set batch_size to a multiple of {shards} x accumulate"
                )
            for part in stage.learning_rates:
                if part not in self._boxed:
                    raise ConfigError(f"{path}.learning_rates.{part}: no such part{did_you_mean(part, self._boxed)}")

    def _on_sigterm(self, signum: int, frame: types.FrameType | None) -> None:
        del signum, frame
        self._stop = True

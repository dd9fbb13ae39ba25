"""The training loop: stages, checkpoints, resumption, metrics."""

import contextlib
import dataclasses
import functools
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

from vlm_jax.adapter import LORA, merged
from vlm_jax.build import AnyExperiment
from vlm_jax.checkpoints.orbax import CHECKPOINTS, Resumed, RunCheckpoints, parts_directory
from vlm_jax.checkpoints.runs import read_parts
from vlm_jax.config import ConfigError, RunConfig, parse
from vlm_jax.data.loader import batch_at
from vlm_jax.evals.evaluator import Evaluator
from vlm_jax.leaves import split
from vlm_jax.optim.adamw import OptimizerSettings
from vlm_jax.optim.patterns import describe
from vlm_jax.paths import absolute
from vlm_jax.sharding.processes import any_process, is_primary, wait_for_all
from vlm_jax.sharding.rules import counted_rows, distribute, placed, use_mesh
from vlm_jax.train import replay
from vlm_jax.train.best import Best
from vlm_jax.train.claim import Claim
from vlm_jax.train.copies import Copies
from vlm_jax.train.evaluation import Evaluations, Tell
from vlm_jax.train.input import ROWS, Given, rows, stage_batches
from vlm_jax.train.replay import REPLAY
from vlm_jax.train.settings import LoopSettings
from vlm_jax.train.stage_step import StageStep
from vlm_jax.train.stages import Span, check_stages, parse_schedule, span_at
from vlm_jax.train.state import Params, TrainState, init_boxed
from vlm_jax.train.step import compile_step, num_shards, peak_bytes
from vlm_jax.train.watch import Profiler, Step, Watch, count_tokens, learning_rates, step_flops
from vlm_jax.train.watchdog import Watchdog
from vlm_jax.train.writers import RunLog
from vlm_jax.types import Fields, Tree

_log = logging.getLogger(__name__)

Progress = Callable[[int, int, Fields], None]  # (step, steps in all, the step's line in the log)


class Interrupted(Exception):
    """The run was stopped by SIGTERM; everything is saved, and rerunning the command resumes."""


class Diverged(RuntimeError):
    """The loss or a gradient is not finite, or is a spike; the message names the step."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a finished run.

    Attributes:
      params: parameters by part, on the mesh: averages where `optimizer.ema` is on, and merged with the adapters of
        `config.lora`.
      step_seconds: median seconds of a step of the last stage, its input included; None without a stage, or where the
        log was lost.
      peak_bytes: bytes that one device needs for a step of the last stage; None likewise.
    """

    params: Params
    step_seconds: float | None
    peak_bytes: int | None


def is_done(metrics: Tree) -> bool:
    """Whether the step that returns `metrics` is finished; True for None, before the first step."""
    return all(value.is_ready() for value in jax.tree.leaves(metrics))


def first_params(
    experiment: AnyExperiment, mesh: Mesh, seed: int, init_from: epath.PathLike | None, init_parts: Sequence[str]
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
        shapes = placed(experiment.boxed_shapes(), mesh)
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
      evaluator: asks the model every `config.evaluation.every` steps and at the end; None for no evaluation.
      tell: called with the step and the lines for people of every evaluation, in the primary process.

    Raises:
      ConfigError: an invalid stage, or a workdir of another config.
      SequenceTooLong: evaluation data with a reference that no answer can equal.
      MalformedRecords: data that cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        experiment: AnyExperiment,
        mesh: Mesh,
        workdir: epath.PathLike,
        *,
        init_from: epath.PathLike | None = None,
        init_parts: tuple[str, ...] = ("encoder", "decoder"),
        progress: Progress = lambda step, steps, metrics: None,
        evaluator: Evaluator | None = None,
        tell: Tell = lambda step, lines: None,
    ):
        self.experiment, self.mesh, self.workdir = experiment, mesh, epath.Path(absolute(workdir))
        self._config, self._seed, self._progress = config, config.seed, progress
        self._init_from = None if init_from is None else parts_directory(init_from)
        self._init_parts = init_parts
        self._settings = parse(LoopSettings, config.loop, "config.loop")
        self._optimizer = parse(OptimizerSettings, config.optimizer, "config.optimizer")
        self._spans = parse_schedule(tuple(config.schedule), config.stages)
        check_stages(self._spans, experiment, num_shards(mesh))
        self._boxed = experiment.boxed_shapes()
        given = self._optimizer, self._settings.bounds, mesh
        self._steps = {span.stage.label: StageStep(experiment, span.stage, *given) for span in self._spans}
        learned = {path.split("/")[0] for step in self._steps.values() for path in step.rates}
        if experiment.lora.rank and LORA not in learned:
            raise ConfigError(
                "config.lora: no stage trains the adapters; add 'lora' to the learning_rates of a stage, or set "
                "config.lora.rank to 0"
            )
        experiment.open_source()  # faults of the data are named before weights are read
        best = Best(self._settings.keep_best, self._settings.best_is)
        self._evaluations = Evaluations(evaluator, self.workdir, config, self.num_steps, tell, best)
        last = self._spans[-1].stage.label
        self._claim = Claim(self.workdir, config, init_from=self._init_from, last_stage=last)
        self._profiler = Profiler(self._settings.profile, self.workdir)
        self._watchdog = Watchdog(self.workdir, self._settings.watchdog)
        self._copies = Copies(self._settings, mesh, self.workdir)
        self._stop = False

    @property
    def num_steps(self) -> int:
        """Number of steps of all stages."""
        return self._spans[-1].stop

    def finished(self) -> bool:
        """Whether every step has been run and saved, and no file of the last checkpoint is damaged.

        Raises:
          CheckpointError: that checkpoint cannot be read here.
        """
        if not (self.workdir / CHECKPOINTS).exists():
            return False
        checkpoints = self._checkpoints()
        with contextlib.closing(checkpoints):
            return checkpoints.latest() == self.num_steps and checkpoints.is_whole(self.num_steps)

    def run(self) -> Outcome:
        """Trains the remaining steps; where another process is lost (`train.watchdog`), this one ends with status 1.

        Raises:
          Interrupted: SIGTERM was received; the state is saved.
          Diverged: a step is not good (`guard.GuardSettings`); the previous checkpoint is kept.
          CheckpointError: a checkpoint cannot be written or read.
          WorkdirInUse: another process runs in the workdir.
          WorkdirError: a file of the workdir cannot be read or written.
        """
        with self._claim.held(), self._watchdog.held(Interrupted, Diverged):
            previous = signal.signal(signal.SIGTERM, self._on_sigterm)
            with contextlib.ExitStack() as stack:
                stack.callback(signal.signal, signal.SIGTERM, previous)
                stack.enter_context(self._copies.held())
                checkpoints = stack.enter_context(contextlib.closing(self._checkpoints()))
                stack.callback(self._profiler.close)
                resumed = self._copies.newest(
                    checkpoints,
                    lambda step: self._abstract_state(span_at(self._spans, step)),
                    lambda step: {"batch": step - span_at(self._spans, step).start},
                )
                step = 0 if resumed is None else resumed.step
                self._watchdog.pause(step)
                log = RunLog(self.workdir, self._config, step, self._settings.writers)
                stack.callback(log.close)
                return self._run(resumed, checkpoints, log)

    def _checkpoints(self) -> RunCheckpoints:
        kept = self._settings.keep, self._settings.keep_every, lambda: self._evaluations.best
        return RunCheckpoints(self.workdir / CHECKPOINTS, *kept)

    def _run(self, resumed: Resumed | None, checkpoints: RunCheckpoints, log: RunLog) -> Outcome:
        step, position = (0, {}) if resumed is None else (resumed.step, resumed.position)
        span = span_at(self._spans, step)
        state = self._first_state(span) if resumed is None else resumed.state
        complete = checkpoints.complete()
        self._evaluations.start(step, complete)
        # Where an earlier process was killed before it was made. The state of a copy has no checkpoint.
        is_saved = resumed is None or step in complete
        self._evaluate(state, log, checkpoints, None if is_saved else position)
        while True:
            state, most_bytes = self._run_stage(span, state, position, log, checkpoints)
            if span is self._spans[-1]:
                break
            span, position = span_at(self._spans, span.stop), {}
            state = self._enter(span, state)
            self._claim.confirm()
            checkpoints.save(span.start, state, position)
            self._evaluate(state, log, checkpoints, None)
        wait_for_all("the last metrics are written")
        self._copies.remove(checkpoints)
        lines = log.read()
        seconds = [line["seconds"] for line in lines if line["stage"] == span.stage.label]
        return Outcome(self._usable(state), statistics.median(seconds) if seconds else None, most_bytes)

    def _run_stage(self, span: Span, state: TrainState, position, log: RunLog, checkpoints: RunCheckpoints):
        """Steps from the state's to the stage's last; returns the state and the most bytes that a step needs."""
        start = position.get("batch", 0)
        with contextlib.closing(self._batches(span, self._settings.input_workers, start=start)) as iterator:
            return self._run_steps(span, state, iterator, log, checkpoints)

    def _run_steps(self, span: Span, state: TrainState, iterator, log: RunLog, checkpoints: RunCheckpoints):
        step = int(state.step)
        with contextlib.closing(self._watch(span)) as watch:
            given = self._next(iterator, None) if step < span.stop else self._probe(span)
            programs: dict[Hashable, jax.stages.Compiled] = {}
            self._program(span, programs, given.batch, watch)
            self._claim.record()
            key = jax.random.key(self._seed)
            watch.restart()
            while step < span.stop:
                kind, program = self._program(span, programs, given.batch, watch)
                step += 1
                self._watchdog.at(step)
                self._profiler.before(step)
                state, metrics = program(state, given.batch, key)
                self._profiler.after(step, metrics)
                watch.add(Step(step, metrics, given.waited, given.tokens, kind))
                last = step == span.stop
                logs = last or self._logs(step)
                if jax.process_count() == 1:
                    stops = self._stop
                else:  # processes synchronise when they log, so that they do not wait for each other at every step
                    stops = logs and any_process(self._stop)
                due = step % self._settings.save_every == 0 or stops
                if logs or due:
                    self._watchdog.pause()
                    jax.block_until_ready(metrics)
                    self._flush(watch, span, log)
                    saves = (due and not last) or (last and span is self._spans[-1])
                    if saves:
                        self._claim.confirm()
                        checkpoints.save(step, state, {"batch": step - span.start})
                        if stops and step < self.num_steps:
                            self._interrupt(step, checkpoints)
                    elif self._copies.is_due(step) and not last:
                        self._copies.save(step, state)
                    if saves or not last:  # else at the start of the next stage, whose first state is saved
                        self._evaluate(state, log, checkpoints, None if saves else {"batch": step - span.start})
                    watch.restart()
                    if not last:
                        self._watchdog.at(step)
                if not last:
                    given = self._next(iterator, metrics)
        return state, max(map(peak_bytes, programs.values()))

    def _logs(self, step: int) -> bool:
        """Whether the log is written after a step, as before a checkpoint, a copy or an evaluation."""
        every = self._settings.log_every, self._settings.save_every
        return self._evaluations.is_due(step) or self._copies.is_due(step) or any(step % steps == 0 for steps in every)

    def _evaluate(self, state: TrainState, log: RunLog, checkpoints: RunCheckpoints, position: Fields | None) -> None:
        """Makes the evaluation of a step if it is due; stopped by SIGTERM, it is left to the next process.

        Args:
          state, log, checkpoints: of the run.
          position: of the input, to save the state where it is stopped; None for a state that is saved.
        """
        step = int(state.step)
        if not self._evaluations.is_due(step):
            return
        if not self._evaluations.make(step, self._usable(state), lambda: self._stop, log.add_evaluation):
            if position is not None:
                checkpoints.save(step, state, position)
            self._interrupt(step, checkpoints)
        if position is not None and self._evaluations.best == step:
            self._claim.confirm()
            checkpoints.save(step, state, position)

    def _usable(self, state: TrainState) -> Params:
        """The parameters of a state as they are used: averaged, with adapters merged."""
        return merged(state.averaged, self.experiment.lora)

    def _interrupt(self, step: int, checkpoints: RunCheckpoints) -> None:
        checkpoints.wait()
        raise Interrupted(f"stopped by SIGTERM and saved at step {step} of {self.num_steps}")

    def _program(
        self, span: Span, programs: dict[Hashable, jax.stages.Compiled], batch: Tree, watch: Watch
    ) -> tuple[Hashable, jax.stages.Compiled]:
        """The kind of a batch, by structure and shape, and its program, compiled into `programs` at the first one."""
        kind = jax.tree.structure(batch), tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if kind not in programs:
            self._watchdog.pause()
            state, settings = self._abstract_state(span), self._steps[span.stage.label].settings
            programs[kind] = compile_step(state, batch, self.mesh, **settings)
            loss, trained = settings["objective"], settings["trained"]
            watch.add_program(kind, functools.partial(step_flops, loss, state, batch, trained, self.experiment.lora))
            _log.info("stage %s: %d programs compiled", span.stage.label, len(programs))
        return kind, programs[kind]

    def _next(self, iterator: Iterator[Tree], metrics: Tree) -> Given:
        """The next batch on the devices, and an upper bound of the seconds that they were idle for it.

        0 while they run the step of `metrics`; else the time until the batch was ready.
        """
        since = time.perf_counter()
        batch = next(iterator)
        waited = time.perf_counter() - since
        tokens = count_tokens(counted_rows(batch, self.mesh))
        return Given(distribute(batch, self.mesh), tokens, waited if is_done(metrics) else 0.0)

    def _watch(self, span: Span) -> Watch:
        return Watch(span, learning_rates(span.stage, self._optimizer), self.mesh, self._settings.peak_flops)

    def _flush(self, watch: Watch, span: Span, log: RunLog) -> None:
        lines = watch.lines()
        for number, line in enumerate(lines, start=1):
            if line["skipped"]:
                self._keep_for_replay(span, line["step"])
            if self._settings.ends_at(int(line["skipped"])):
                log.append(lines[:number])
                raise Diverged(
                    f"the loss is {line['loss']} and the norm of the gradient {line['grad_norm']} at step "
                    f"{line['step']} (stage {span.stage.label}), not finite or a spike; lower the stage's "
                    "learning_rates or clip_norm in a new run, or go on without such steps by "
                    "config.loop.on_nonfinite=skip. The newest checkpoint is from before this step, and its batch in "
                    f"{self.workdir / REPLAY}"
                )
        log.append(lines)
        self._progress(lines[-1]["step"], self.num_steps, lines[-1])

    def _first_state(self, span: Span) -> TrainState:
        params = first_params(self.experiment, self.mesh, self._seed, self._init_from, self._init_parts)
        return self._enter(span, TrainState(np.zeros((), np.int32), params, None))

    def _enter(self, span: Span, state: TrainState) -> TrainState:
        """The state at the start of a stage: the same parameters, a fresh optimizer, the objective's reference."""
        like = dataclasses.replace(self._abstract_state(span), reference=None)
        out = jax.tree.map(lambda leaf: leaf.sharding, like)
        own = self._steps[span.stage.label]
        for line in describe(self._boxed, own.rates):
            _log.info("stage %s: %s", span.stage.label, line)
        tx, trained = own.tx, own.trained

        ema = self._optimizer.ema is not None

        def fresh(step, params):
            return dataclasses.replace(init_boxed(params, tx, trained, ema=ema), step=step)

        reference = span.stage.settings.reference(split(state.averaged, trained)[0], self.mesh)
        with use_mesh(self.mesh):
            start = np.full((), span.start, np.int32)
            state = jax.jit(fresh, out_shardings=out, donate_argnums=1)(start, state.averaged)
        return dataclasses.replace(state, reference=reference)

    def _abstract_state(self, span: Span) -> TrainState:
        return self._steps[span.stage.label].abstract_state()

    def _probe(self, span: Span) -> Given:
        """A batch to compile for when the stage has no step left."""
        with contextlib.closing(self._batches(span)) as iterator:
            return self._next(iterator, None)

    def _batches(self, span: Span, num_workers: int = 0, *, start: int = 0) -> Any:
        more: Any = {"num_workers": num_workers, "folder": self.workdir / ROWS, "start": start}
        return stage_batches(self.experiment, span.stage, self._seed, self.mesh, **more)

    def _keep_for_replay(self, span: Span, step: int) -> None:
        """Makes the batch of a step again, and writes it."""
        if is_primary():
            made = rows(self.experiment, span.stage, self._seed, folder=self.workdir / ROWS)
            batch = batch_at(made, span.stage.batch_size, step - 1 - span.start)
            replay.write(self.workdir, step, batch, self._seed)

    def _on_sigterm(self, signum: int, frame: types.FrameType | None) -> None:
        del signum, frame
        self._stop = True

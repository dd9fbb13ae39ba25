"""What a run measures of itself: tokens, seconds, learning rates, memory, FLOPs, compilations, and a profiler trace."""

import dataclasses
import logging
import resource
import sys
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from vlm_jax.adapter import LoraSettings, adapted
from vlm_jax.costs.chips import peak_flops
from vlm_jax.costs.training import training_flops
from vlm_jax.leaves import joined, split
from vlm_jax.optim.adamw import OptimizerSettings, schedule
from vlm_jax.sharding.processes import sum_over_processes
from vlm_jax.train.objectives.objective import Loss
from vlm_jax.train.stages import Span, Stage
from vlm_jax.train.state import TrainState
from vlm_jax.train.writers import LEARNING_RATE
from vlm_jax.types import PADDING_SEGMENT, TEXT_SLOT, Array, Batch, Fields, Params, Tree

PROFILE = "profile"  # folder of a workdir
COMPILED = "/jax/core/compile/backend_compile_duration"
TOKENS = ("tokens", "learned_tokens", "visual_tokens")

_log = logging.getLogger(__name__)


def count_tokens(batch: Tree) -> dict[str, int]:
    """Positions of a batch's rows of text and images; empty for a batch of another kind.

    Args:
      batch: on the host; a `Batch`, or a tree with some.

    Returns:
      `tokens`, all but padding; `learned_tokens`, whose prediction has a weight; `visual_tokens`, places of visual
      tokens and learned rows, before any drop inside the decoder.
    """
    leaves = jax.tree.leaves(batch, is_leaf=lambda leaf: isinstance(leaf, Batch))
    rows = [leaf for leaf in leaves if isinstance(leaf, Batch)]
    if not rows:
        return {}
    found: dict[str, int] = dict.fromkeys(TOKENS, 0)
    for row in rows:
        of_row = row.segment_ids != PADDING_SEGMENT, _loss_weights(row), row.visual_index != TEXT_SLOT
        for name, marks in zip(TOKENS, of_row, strict=True):
            found[name] += int(np.count_nonzero(marks))
    return found


def _loss_weights(row: Batch) -> Array:
    return np.zeros(0) if row.loss_weights is None else row.loss_weights


def learning_rates(stage: Stage, settings: OptimizerSettings) -> Callable[[int], dict[str, float]]:
    """A function from steps of a stage that are done to the learning rates of the next one, by name."""
    given = stage.warmup_steps, stage.steps, settings.final_scale
    schedules = {name: schedule(peak, *given) for name, peak in stage.learning_rates.items()}
    rates = jax.jit(lambda count: {name: rate(count) for name, rate in schedules.items()})

    def at(count: int) -> dict[str, float]:
        return {name: float(rate) for name, rate in jax.device_get(rates(np.int32(count))).items()}

    return at


def step_flops(objective: Loss, state: TrainState, batch: Tree, trained: frozenset[str], lora: LoraSettings) -> int:
    """FLOPs of a step as of model FLOPs utilisation, over all devices; see `costs.training`."""
    params, frozen = split(state.params, trained)

    def loss(params: Params, frozen: Params, batch: Tree, key: jax.Array, reference: Params | None) -> jax.Array:
        reference = None if reference is None else adapted(reference, lora)
        return objective(adapted(joined(frozen, params), lora), batch, key, 1.0, reference)[0]

    key = jax.eval_shape(lambda: jax.random.key(0))
    return training_flops(loss, params, frozen, batch, key, state.reference)


class Compilations:
    """Counts the programs that XLA compiles, or reads from the compilation cache, in this process.

    Attributes:
      count: programs so far.
      seconds: time that they took.
    """

    def __init__(self):
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        del kwargs
        if event == COMPILED:
            self.count, self.seconds = self.count + 1, self.seconds + duration_secs

    def close(self) -> None:
        """Counts no more."""
        jax.monitoring.unregister_event_duration_listener(self._add)


class Profiler:
    """Traces some steps into `WORKDIR/profile`, which TensorBoard and XProf read.

    Args:
      window: first step, from 1, and number of steps; None for no trace.
      workdir: of the run.
    """

    def __init__(self, window: tuple[int, int] | None, workdir: epath.Path):
        self._first, count = window or (0, 0)
        self._last, self._folder, self._is_on = self._first + count - 1, workdir / PROFILE, False

    def before(self, step: int) -> None:
        """Starts the trace before the first step of the window, or the next where a run resumes inside it."""
        if not self._is_on and self._first <= step <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._is_on = True

    def after(self, step: int, metrics: Tree) -> None:
        """Ends the trace when the window's last step is finished."""
        if self._is_on and step == self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends a trace."""
        if self._is_on:
            jax.profiler.stop_trace()
            self._is_on = False


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that is not in the log yet.

    Attributes:
      number: steps of the run so far.
      metrics: scalars on the devices.
      waited: seconds that the devices were idle for its batch, at most.
      tokens: `count_tokens` of this process's part of the batch, so that those of all processes add up to the batch's.
      program: the program that ran it.
    """

    number: int
    metrics: Tree
    waited: float
    tokens: dict[str, int]
    program: Hashable


class Watch:
    """Measures the steps of one stage between two writes of the log.

    Args:
      span: the stage.
      rates: steps of the stage that are done -> learning rates of the next one by name.
      mesh: devices of the run.
      peak: FLOP/s of one device; None for that of its kind, if known.
    """

    def __init__(self, span: Span, rates: Callable[[int], dict[str, float]], mesh: Mesh, peak: float | None):
        self._label, self._start, self._rates = span.stage.label, span.start, rates
        self._num_devices, device = mesh.size, mesh.devices.flat[0]
        self._peak = peak_flops(device.device_kind) if peak is None else peak
        self._flops: dict[Hashable, int] = {}
        self._steps: list[Step] = []
        self._compilations, self._logged, self._is_warm = Compilations(), (0, 0.0), False
        self.restart()

    def add_program(self, program: Hashable, count: Callable[[], int]) -> None:
        """A program of the stage, whose FLOPs are counted where the peak of the devices is known."""
        if self._peak is not None:
            self._flops[program] = count()

    def add(self, step: Step) -> None:
        """A step that was started."""
        self._steps.append(step)

    def close(self) -> None:
        """Ends the count of compilations."""
        self._compilations.close()

    def restart(self) -> None:
        """Begins to measure anew, after what is not a step: a checkpoint or an evaluation."""
        self._since, self._compiled_before = time.perf_counter(), self._compilations.count

    def lines(self) -> list[Fields]:
        """Lines of the log for all finished steps since the last call; the last one has what is measured over all."""
        steps, self._steps = self._steps, []
        seconds = (time.perf_counter() - self._since) / len(steps)
        if self._is_warm and self._compilations.count > self._compiled_before:
            _log.warning(
                "stage %s: %d programs were compiled in steps %d to %d, which waited for them; rows of a shape that "
                "did not occur before are the usual reason (config.row.buckets bounds their number)",
                *(self._label, self._compilations.count - self._compiled_before, steps[0].number, steps[-1].number),
            )
        counts = self._counted(steps)
        lines = []
        for step, of_step in zip(steps, counts, strict=True):
            values = {name: float(value) for name, value in step.metrics.items()}
            rates = {
                f"{LEARNING_RATE}{name}": rate for name, rate in self._rates(step.number - 1 - self._start).items()
            }
            timed = {"seconds": seconds, "input_seconds": step.waited}
            lines.append({"step": step.number, "stage": self._label, **values, **rates, **of_step, **timed})
        totals = {name: sum(of_step[name] for of_step in counts) for name in counts[0]}
        elapsed = seconds * len(steps)
        lines[-1] |= {f"{name}_per_second": total / elapsed for name, total in totals.items()}
        if self._peak is not None:
            flops = sum(self._flops[step.program] for step in steps)
            lines[-1]["mfu"] = flops / (elapsed * self._peak * self._num_devices)
        lines[-1] |= memory() | self._compiled()
        self._is_warm = True
        self.restart()
        return lines

    def _counted(self, steps: list[Step]) -> list[dict[str, int]]:
        """Tokens of the whole batch of each step."""
        names = list(steps[0].tokens)
        sums = sum_over_processes(np.array([[step.tokens[name] for name in names] for step in steps], np.int64))
        return [dict(zip(names, row, strict=True)) for row in sums.tolist()]

    def _compiled(self) -> Fields:
        """Compilations since the last call."""
        (count, seconds), now = self._logged, (self._compilations.count, self._compilations.seconds)
        self._logged = now
        return {"compilations": now[0] - count, "compile_seconds": now[1] - seconds}


def memory() -> dict[str, int]:
    """Bytes that this process has held at most, and of its fullest device where the backend tells it."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    told = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    for name, key in (("device_bytes", "bytes_in_use"), ("device_peak_bytes", "peak_bytes_in_use")):
        values = [stats[key] for stats in told if key in stats]
        if values:
            found[name] = max(values)
    return found

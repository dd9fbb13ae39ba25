"""Successive halving: a point whose loss is high at a rung is stopped, as Ray Tune's scheduler decides.

Every point keeps its losses at the rungs in its own folder, and reads those of the points that it is compared with. So
points are compared in whatever process, and on whatever host, they run, and none waits for another.
"""

import dataclasses
import importlib
import math
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from etils import epath

from vlm_jax.config import ConfigError
from vlm_jax.ranges import Count, Range
from vlm_jax.sharding.processes import any_process, is_primary
from vlm_jax.sweep.executor import Stopped
from vlm_jax.train.loop import Progress
from vlm_jax.train.workdir import METRICS_FILE, each_line, read_lines, write_lines
from vlm_jax.types import Fields

RUNGS_FILE = "rungs.jsonl"
WINDOW = 4  # a rung's loss is the mean of the last of so many parts of the steps


@dataclasses.dataclass(frozen=True)
class HalvingSettings:
    """`config.sweep.halving`.

    Attributes:
      first_steps: steps of a point's own training at the first rung; the next ones are at this times `factor`, times
        its square, and so on.
      factor: about one of so many points that get to a rung goes on from it.
    """

    first_steps: Count
    factor: Annotated[int, Range(2, 100)] = 4

    def rungs(self, num_steps: int) -> Iterator[int]:
        """Steps of the rungs of a training of `num_steps`, before its last step."""
        step = self.first_steps
        while step < num_steps:
            yield step
            step *= self.factor


@dataclasses.dataclass(frozen=True)
class Halving:
    """The rungs of one training; it can be pickled.

    Attributes:
      settings: of the sweep.
      folder: of the training; `rungs.jsonl` there has a line for each rung.
      others: folders of the trainings that it is compared with.
    """

    settings: HalvingSettings
    folder: epath.Path
    others: tuple[epath.Path, ...]

    def check(self, step: int, num_steps: int) -> None:
        """Decides at every rung up to a step that has no decision yet; all processes of a training call this alike.

        Args:
          step: whose metrics, and those before it, are written.
          num_steps: of the whole training.

        Raises:
          Stopped: at one of these rungs, now or before.
        """
        stops = is_primary() and (stopped_at(self.folder) is not None or self._decide(step, num_steps))
        if any_process(stops):
            line = stopped_at(self.folder)
            raise Stopped(told(line) if line is not None else "by another process of its training")

    def watched(self, progress: Progress) -> Progress:
        """The callback of a training's steps, which also raises Stopped."""
        before = 0

        def wrapped(step: int, steps: int, metrics: Fields) -> None:
            nonlocal before
            progress(step, steps, metrics)
            if any(before < rung <= step for rung in self.settings.rungs(steps)):
                self.check(step, steps)
            before = step

        return wrapped

    def _decide(self, step: int, num_steps: int) -> bool:
        """Whether the training is stopped at a rung that has no line yet; writes the lines."""
        lines = read_lines(self.folder / RUNGS_FILE)
        done = {line["step"] for line in lines}
        for rung in self.settings.rungs(num_steps):
            if rung in done or rung > step:
                continue
            loss = rung_loss(self.folder, rung)
            others = [] if loss is None else self._others_at(rung)
            stops = loss is None or not goes_on(loss, others, rung, self.settings)
            lines.append({"step": rung, "loss": loss, "compared_with": len(others), "stopped": stops})
            write_lines(self.folder / RUNGS_FILE, lines)
            if stops:
                return True
        return False

    def _others_at(self, step: int) -> list[float]:
        found = [line for folder in self.others for line in each_line(folder / RUNGS_FILE) if line["step"] == step]
        return [line["loss"] for line in found if line["loss"] is not None]


def rung_loss(folder: epath.Path, rung: int) -> float | None:
    """The mean of the finite losses of the last quarter of the steps up to a rung; None without any."""
    start = rung - max(1, rung // WINDOW)
    losses = [line["loss"] for line in each_line(folder / METRICS_FILE) if start < line["step"] <= rung]
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else None


def steps_done(folder: epath.Path) -> int:
    """The last step of a training whose metrics are written; 0 before the first."""
    return max((line["step"] for line in each_line(folder / METRICS_FILE)), default=0)


def goes_on(loss: float, others: list[float], step: int, settings: HalvingSettings) -> bool:
    """Whether a point goes on from a rung: its loss is among the lowest, 1 of `factor`, of those there before it.

    Args:
      loss: of the point.
      others: losses of the points that got to the rung before; the first one goes on.
      step: of the rung.
      settings: of the sweep.

    Source: Li et al. 2020, "A system for massively parallel hyperparameter tuning", by `ASHAScheduler` of Ray Tune.
    """
    schedulers = ray_schedulers()
    limit = step * settings.factor  # of the steps, behind this rung
    given: Any = {"grace_period": settings.first_steps, "reduction_factor": settings.factor, "max_t": limit}
    scheduler = schedulers.ASHAScheduler(time_attr="step", metric="loss", mode="min", **given)
    decision = schedulers.TrialScheduler.CONTINUE
    for number, value in enumerate([*others, loss]):
        trial = types.SimpleNamespace(trial_id=str(number))
        scheduler.on_trial_add(None, trial)
        decision = scheduler.on_trial_result(None, trial, {"step": step, "loss": value})
    return decision == schedulers.TrialScheduler.CONTINUE


def ray_schedulers() -> types.ModuleType:
    """`ray.tune.schedulers`.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("ray.tune.schedulers")
    except ImportError as error:
        raise ConfigError(
            f"config.sweep.halving: Ray Tune is not installed ({error}); pip install 'vlm_jax[ray]', or set it to None"
        ) from None


def stopped_at(folder: epath.Path) -> Fields | None:
    """The line of the rung at which a training was stopped; None where it was not."""
    return next((line for line in each_line(folder / RUNGS_FILE) if line["stopped"]), None)


def told(line: Mapping[str, Any]) -> str:
    """Why a training was stopped, from its line."""
    if line["loss"] is None:
        return f"at step {line['step']}, where no loss was finite"
    return f"at step {line['step']} with a loss of {line['loss']:.4g}, compared with {line['compared_with']} others"

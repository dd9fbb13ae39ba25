"""Trains and evaluates one point of a sweep, in the folder of the point."""

import functools
import json
import pickle
from collections.abc import Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from vlm_jax.build import build
from vlm_jax.build.settings import EvaluationSettings
from vlm_jax.config import config_hash, parse
from vlm_jax.evals.metrics import chosen_metrics
from vlm_jax.evals.scores import SCORED, Scores
from vlm_jax.evals.tally import Tally
from vlm_jax.evals.timing import generation_seconds
from vlm_jax.evals.vqa import answers
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sweep.executor import Report, exclusive
from vlm_jax.sweep.halving import Halving, HalvingSettings, steps_done
from vlm_jax.sweep.points import Point, shared_config
from vlm_jax.train.loop import Outcome, Progress, Trainer, first_params
from vlm_jax.train.workdir import whole_file
from vlm_jax.types import Fields

ANSWERS_FILE = "answers.jsonl"


class PointRunner:
    """Runs points of one sweep in this process; pickled, it is that of the process of a worker, see `kept_runner`.

    Args:
      base: `config.base`.
      shared: the stages that every point starts from.
      workdir: folder of the sweep.

    Attributes:
      metrics: names of metrics by task, as of `evals.metrics.metric_of`.
    """

    def __init__(self, base: Any, shared: tuple[str, ...], workdir: epath.PathLike):
        self._base, self._shared, self._workdir = base, shared, epath.Path(workdir)
        evaluation = parse(EvaluationSettings, base.evaluation, "config.base.evaluation")
        self.metrics = chosen_metrics(evaluation.metrics, "config.base.evaluation.metrics")
        self._settings = parse(MeshSettings, base.mesh, "config.base.mesh")
        self._outcomes: dict[str, Outcome] = {}
        self.keeps_one = False  # outcome at a time, where points with the same parameters follow each other

    def __reduce__(self):
        return kept_runner, (self._pickled,)

    @functools.cached_property
    def _pickled(self) -> bytes:
        return pickle.dumps((self._base, self._shared, str(self._workdir)))

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices of this process.

        Raises:
          ConfigError: they are not as many as `config.base.mesh` says.
        """
        return make_mesh(self._settings)

    def folder(self, label: str) -> epath.Path:
        """The folder of a point."""
        return self._workdir / "points" / label

    def train_shared(self, seed: int, report: Report) -> None:
        """Trains the steps that are left of the shared stages."""
        config, name = shared_config(self._base, seed, self._shared), shared_name(seed)
        with exclusive(self._workdir / name):
            trainer = Trainer(config, build(config), self.mesh, self._workdir / name, progress=_progress(report, name))
            if not trainer.finished():  # else its parameters need not be read, nor its step compiled
                trainer.run()

    def halving(self, label: str, settings: HalvingSettings, others: Sequence[str]) -> Halving:
        """The rungs of a training.

        Args:
          label: of the training.
          settings: `config.sweep.halving`.
          others: labels of the trainings that it is compared with.
        """
        return Halving(settings, self.folder(label), tuple(map(self.folder, others)))

    def train(self, point: Point, report: Report, *, keep: bool, halving: Halving | None = None) -> Outcome:
        """The run that the point's parameters are from, none where it trains nothing.

        Args:
          point: what is trained, from the shared stages that are finished.
          report: is told its steps.
          keep: whether the outcome stays in memory, for another point with the same parameters.
          halving: rungs at which the training may be stopped; None for none.

        Raises:
          Stopped: the training is stopped at a rung, or was.
        """
        label, (config, experiment) = point.trained_as, point.training
        outcome = self._outcomes.pop(label, None)
        if self.keeps_one:
            self._outcomes.clear()
        if outcome is None:
            start = self._workdir / shared_name(config.seed) / "checkpoints" if self._shared else None
            given: Any = {"init_from": start, "init_parts": point.start}
            if config.schedule:
                told = _progress(report, label)
                if halving is not None:
                    told = halving.watched(told)
                trainer = Trainer(config, experiment, self.mesh, self.folder(label), **given, progress=told)
                if halving is not None:  # another process may have been stopped, or killed, at a rung
                    halving.check(steps_done(self.folder(label)), trainer.num_steps)
                outcome = trainer.run()
            else:
                outcome = Outcome(first_params(experiment, self.mesh, config.seed, **given), None, None)
        if keep:
            self._outcomes[label] = outcome
        return outcome

    def run(
        self, point: Point, report: Report, *, command: str, timed: bool, keep: bool, halving: Halving | None = None
    ) -> Fields:
        """Trains and evaluates a point.

        Args:
          point, report, keep, halving: as of `train`.
          command: the command that runs only this point, for its row.
          timed: whether answers are timed.

        Returns:
          The row of `results.jsonl`.

        Raises:
          WorkdirInUse: another process runs the point.
          Stopped: as of `train`.
        """
        with exclusive(self.folder(point.label)) as confirm:
            outcome = self.train(point, report, keep=keep, halving=halving)
            evaluation = parse(EvaluationSettings, point.config.evaluation, "config.evaluation")
            samples = point.experiment.open_source().evaluation(point.config.seed)
            tally, scores = Tally(), Scores(self.metrics)
            with whole_file(self.folder(point.label) / ANSWERS_FILE) as file:
                for answer in answers(point.experiment, outcome.params, samples, evaluation):
                    tally.add(vars(answer))
                    scores.add(vars(answer))
                    kept = {name: getattr(answer, name) for name in ("sample_id", "correct", "turns", *SCORED)}
                    file.write(json.dumps(kept) + "\n")
                confirm()
            times = generation_seconds(point.experiment, outcome.params, samples, evaluation) if timed else {}
        return {**_row(point, outcome, tally, times, command), "scores": scores.result()}


@functools.lru_cache(maxsize=1)
def kept_runner(pickled: bytes) -> PointRunner:
    """The runner of a worker, which keeps the parameters for the next point that has them."""
    runner = PointRunner(*pickle.loads(pickled))
    runner.keeps_one = True
    return runner


def shared_name(seed: int) -> str:
    """The run of the shared stages, and its folder."""
    return f"shared_{seed}"


def _progress(report: Report, run: str) -> Progress:
    """The callback of a run's steps."""

    def progress(step: int, steps: int, metrics: Fields) -> None:
        del steps
        report(run, step, f"{run}: {metrics['stage']}, loss {metrics['loss']:.3f}")

    return progress


def _row(point: Point, outcome: Outcome, tally: Tally, times: dict[str, float], command: str) -> Fields:
    left, mean = point.costs.num_visual_tokens, point.costs.mean_visual_tokens
    if point.experiment.system.budget is None:  # pictures differ, and the costs are those of one sample
        left, mean = tally.left(point.experiment.system.model)
    return {
        "label": point.label,
        "connector": point.connector,
        "token_budget": point.config.token_budget,
        "num_visual_tokens": left,
        "mean_visual_tokens": mean,
        "realised_visual_tokens": tally.realised(),
        "accuracy": tally.accuracy(),
        "num_params": point.costs.num_params,
        "flops": point.costs.flops,
        "step_seconds": outcome.step_seconds,
        **times,
        "peak_bytes": outcome.peak_bytes,
        "seed": point.config.seed,
        **({"drawn": dict(point.drawn)} if point.drawn else {}),
        "config_hash": config_hash(point.config),
        "command": command,
    }

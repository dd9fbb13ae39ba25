"""Evaluations of a run on the way and at its end, whose answers are kept."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import numpy as np
from etils import epath

from vlm_jax.config import ConfigError, RunConfig, plain
from vlm_jax.evals.evaluator import Evaluator
from vlm_jax.sharding.processes import any_process, is_primary, sum_over_processes, wait_for_all
from vlm_jax.train.best import Best
from vlm_jax.train.workdir import read_lines, whole_file, write_lines, write_whole
from vlm_jax.types import Fields, Params

ANSWERS, METRICS_FILE, FINAL_FILE = "evaluations", "evaluations.jsonl", "evaluation.json"

NO_COMPARISON = Best()

_log = logging.getLogger(__name__)

Record = Callable[[int, Fields], None]  # (step, metrics)
Tell = Callable[[int, list[str]], None]  # (step, lines for people)


class _Stopped(Exception):
    """The evaluation is left to a later process."""


class Evaluations:
    """Answers of step N in `evaluations/N.jsonl`, metrics of all in `evaluations.jsonl`, the last in `evaluation.json`.

    An evaluation whose line of metrics is missing is made, or made again; its answers get their file's name when all
    are written.

    Args:
      evaluator: asks and measures; None for no evaluation.
      workdir: of the run.
      config: of the run; an evaluation of other settings or other data is made again.
      num_steps: of the run.
      tell: called in the primary process with the lines of every evaluation.
      best: compares evaluations.

    Attributes:
      best: the step of the best one whose checkpoint is kept; None for none yet.

    Raises:
      ConfigError: there is nothing to compare.
      As the evaluator's `check`.
    """

    def __init__(
        self,
        evaluator: Evaluator | None,
        workdir: epath.Path,
        config: RunConfig,
        num_steps: int,
        tell: Tell,
        best: Best = NO_COMPARISON,
    ):
        self.best: int | None = None
        self._compare = best
        self._evaluator, self._workdir, self._num_steps, self._tell = evaluator, workdir, num_steps, tell
        self._every = None if evaluator is None else evaluator.every
        self._settings = {key: value for key, value in plain(config.evaluation).items() if key != "every"}
        self._settings |= {key: value for key, value in plain(config.data).items() if key.startswith("evaluation_")}
        if evaluator is not None:
            if best.number is not None and self._every is None:
                raise ConfigError(
                    "config.loop.keep_best: all evaluations but the last are off; set config.evaluation.every"
                )
            evaluator.check()

    def start(self, step: int, kept: Iterable[int]) -> None:
        """Removes evaluations of steps after `step`, which a process that was killed has made and this one repeats.

        Args:
          step: steps done.
          kept: numbers of the run's checkpoints; all processes call this alike.
        """
        lines = self._lines() if is_primary() else []
        if any(line["step"] > step for line in lines):
            write_lines(self._workdir / METRICS_FILE, [line for line in lines if line["step"] <= step])
        kept = set(kept)
        self._find_best(kept)
        self._warn_of_others([line for line in lines if line["step"] in kept and line["step"] <= step])

    def is_due(self, step: int) -> bool:
        """Whether there is an evaluation of a step."""
        if self._evaluator is None:
            return False
        return step == self._num_steps or (self._every is not None and step > 0 and step % self._every == 0)

    def make(self, step: int, params: Params, stops: Callable[[], bool], record: Record) -> bool:
        """Makes the evaluation of a step that is due, if it is not made yet; all processes call this alike.

        Args:
          step: steps done.
          params: after them.
          stops: asked after every row; whether to leave the evaluation to a later process.
          record: called with the metrics when it is made.

        Returns:
          Whether it was not stopped.
        """
        assert self._evaluator is not None
        is_missing = any_process(is_primary() and self._line(step) is None)
        if is_missing:
            metrics = self._asked(step, params, stops)
            if metrics is None:
                return False
            record(step, metrics)
        self._find_best([step, *([] if self.best is None else [self.best])])
        if is_primary() and (is_missing or step == self._num_steps):
            line = self._line(step)
            assert line is not None
            self._tell(step, self._evaluator.lines(line))
        return True

    def _asked(self, step: int, params: Params, stops: Callable[[], bool]) -> Fields | None:
        """Metrics of new answers, both written, the answers as they come; None where it was stopped."""
        evaluator = self._evaluator
        assert evaluator is not None

        def written(file: IO[str]) -> Iterator[Fields]:
            for row in evaluator.rows(params):
                file.write(json.dumps(row) + "\n")
                yield row
                if any_process(stops()):
                    raise _Stopped

        try:
            with whole_file(self._workdir / ANSWERS / f"{step}.jsonl") as file:
                metrics = evaluator.metrics(written(file))
        except _Stopped:
            return None
        if is_primary():
            self._write(step, metrics)
        wait_for_all(f"the evaluation of step {step} is written")
        return metrics

    def _write(self, step: int, metrics: Fields) -> None:
        if step == self._num_steps:
            write_whole(self._workdir / FINAL_FILE, json.dumps(metrics, indent=2) + "\n")
        line = {"step": step, "settings": self._settings, **metrics}
        before = [line for line in self._lines() if line["step"] != step]
        write_lines(self._workdir / METRICS_FILE, sorted([*before, line], key=lambda line: line["step"]))

    def _line(self, step: int) -> Fields | None:
        """The line of a step's evaluation with these settings."""
        found = [line for line in self._lines() if line["step"] == step and self._is_ours(line)]
        return found[0] if found and (self._workdir / ANSWERS / f"{step}.jsonl").exists() else None

    def _find_best(self, steps: Iterable[int]) -> None:
        """Finds the best of the evaluations of some steps; by the primary process, since others may read older lines.

        Raises:
          ConfigError: as `Best.step`, in all processes.
        """
        if self._compare.number is None:
            return
        found, failure = 0, None
        if is_primary():
            steps = set(steps)
            try:
                lines = [line for line in self._lines() if line["step"] in steps]
                found = self._compare.step(filter(self._is_ours, lines))
            except ConfigError as error:
                failure = error
        if any_process(failure is not None):
            raise failure or ConfigError("config.loop.keep_best: the first process names what is wrong")
        self.best = int(sum_over_processes(np.asarray(found or 0))) or None

    def _warn_of_others(self, lines: list[Fields]) -> None:
        """Says which checkpoint was kept as the best of evaluations with other settings, and is no more."""
        others = [line for line in lines if not self._is_ours(line)]
        try:
            step = self._compare.step(others)
        except ConfigError:  # they have no such number, so that none was kept by it
            return
        if step is not None:
            _log.warning(
                "checkpoint %d is the best by %s of evaluations with other settings or data, which are not compared "
                "with those to come, so that the next save deletes it if it is not among the newest: copy it before",
                step,
                self._compare.number,
            )

    def _is_ours(self, line: Fields) -> bool:
        return line["settings"] == self._settings

    def _lines(self) -> list[Fields]:
        return read_lines(self._workdir / METRICS_FILE)

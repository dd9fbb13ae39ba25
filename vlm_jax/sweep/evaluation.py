"""Evaluates a release with training-free reducers at token budgets; resumes an interrupted run."""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence

import rich.console
from etils import epath

from vlm_jax.config import ConfigError
from vlm_jax.evals.paired import differences, told_differences
from vlm_jax.evals.predictions import write_parquet
from vlm_jax.paths import absolute
from vlm_jax.sweep.executor import Executor, LocalExecutor, Task
from vlm_jax.sweep.failures import Failures
from vlm_jax.sweep.frontier import combine_seeds, draw_frontier
from vlm_jax.sweep.hard import DOWNSAMPLED, with_hard_questions
from vlm_jax.sweep.point_run import ANSWERS_FILE
from vlm_jax.sweep.progress import PointsProgress
from vlm_jax.sweep.release_points import RefusedPoint
from vlm_jax.sweep.release_run import Line, ReleaseEvaluation, ReleaseRunner
from vlm_jax.sweep.report import Example, write_report
from vlm_jax.sweep.retained import RETAINED_FILE, retained, write_retained
from vlm_jax.sweep.rows import RESULTS_FILE, run_points
from vlm_jax.sweep.run import EXAMPLES_PER_TASK, FRONTIER_FILE, REPORT_FILE, drawable, results_table
from vlm_jax.train.claim import Claim
from vlm_jax.train.workdir import each_line, read_lines, write_lines
from vlm_jax.types import Fields

CONTROLS = frozenset({"random", "uniform_stride", "downsample_image"})
PARQUET_FILE, COMPARISON_FILE = "answers.parquet", "comparison.jsonl"


class Evaluation:
    """One workdir's evaluation of a release.

    Args:
      settings: settings of the evaluation; other settings need another workdir.
      workdir: folder of the results, local or `gs://`.
      console: where progress and tables are printed.
      executor: where points are evaluated; in this process if None.

    Raises:
      ConfigError, InfeasibleBudget, SequenceTooLong, MalformedRecords: before weights are read or anything is written.
    """

    def __init__(
        self,
        settings: ReleaseEvaluation,
        workdir: epath.PathLike,
        *,
        console: rich.console.Console | None = None,
        executor: Executor | None = None,
    ):
        self.workdir, self._settings = epath.Path(absolute(workdir)), settings
        self._console = console or rich.console.Console(markup=False)
        self._executor = executor or LocalExecutor()
        self._runner = ReleaseRunner(settings, self.workdir)
        if self._executor.in_process:
            _ = self._runner.mesh  # of devices that are too few or too many, before anything is read
        self.points, self.refused = self._runner.points, self._runner.refused
        for refused in self.refused:
            self._console.print(f"{refused.label}: skipped: {refused.reason}", markup=False, soft_wrap=True)
        if not self.points:
            raise ConfigError(f"no point can be evaluated:\n{_listed(self.refused)}")
        self._runner.check_references()
        self._claim = Claim(self.workdir, settings.of_answers)

    def run(self) -> dict[str, str]:
        """Evaluates unfinished points, then draws the frontier and writes the report.

        Returns:
          {label: error} of failed points, as in `failed.jsonl`; empty when all are finished.

        Raises:
          WorkdirInUse: another process evaluates in the workdir.
        """
        with self._claim.held():
            self._claim.record()
            return self._run()

    def _run(self) -> dict[str, str]:
        results = {line["label"]: line for line in read_lines(self.workdir / RESULTS_FILE)}
        todo = [point.label for point in self.points if point.label not in results]
        failures, questions = Failures(self.workdir, self._console), len(self._runner.questions)
        if todo:
            self._console.print(f"{len(todo)} points, {questions} questions each")
            if self._executor.in_process:
                _ = self._runner.params  # a release that cannot be read is no fault of a point
            tasks = [Task(label, functools.partial(self._runner.run, label)) for label in todo]
            with PointsProgress(self._console, "questions", len(todo) * questions, len(todo)) as progress:
                run_points(self._executor, tasks, todo, results, failures, self._claim, progress)
        ordered = [results[point.label] for point in self.points if point.label in results]
        if ordered:
            self._report(ordered)
            labels = [result["label"] for result in ordered]
            if self._settings.parquet:
                for folder in map(self._runner.folder, labels):
                    write_parquet(each_line(folder / ANSWERS_FILE), folder / PARQUET_FILE)
            if self._settings.compare is not None:
                self._compare(labels)
        return failures.errors

    def _compare(self, labels: Sequence[str]) -> None:
        """Says and keeps how the points differ from those of `compare`."""
        assert self._settings.compare is not None
        other, lines = epath.Path(absolute(self._settings.compare)), []
        for label in labels:
            theirs = other if (other / ANSWERS_FILE).exists() else other / "points" / label
            if not (theirs / ANSWERS_FILE).exists():
                self._console.print(f"{label}: not compared: {theirs} has no answers", markup=False, soft_wrap=True)
                continue
            rows = each_line(self._runner.folder(label) / ANSWERS_FILE), each_line(theirs / ANSWERS_FILE)
            found = differences(*rows, self._settings.chosen_metrics)
            lines += [{"label": label, "against": str(theirs), **dataclasses.asdict(one)} for one in found]
            self._console.print(
                "\n".join([f"{label} against {theirs}", *told_differences(found)]), markup=False, soft_wrap=True
            )
        write_lines(self.workdir / COMPARISON_FILE, lines)

    def _report(self, results: Sequence[Line]) -> None:

        def answers(label: str) -> Iterator[Fields]:
            return each_line(self._runner.folder(label) / ANSWERS_FILE)

        shown = [drawable(line) for line in with_hard_questions(results, DOWNSAMPLED, answers)]
        kept = retained(combine_seeds(shown), answers, self._settings.chosen_metrics, CONTROLS)
        write_retained(kept, self.workdir / RETAINED_FILE)
        draw_frontier(shown, self.workdir / FRONTIER_FILE, controls=CONTROLS)
        title = f"Visual token budgets: {self._settings.release}"
        examples = self._examples([result["label"] for result in results])
        path = self.workdir / REPORT_FILE
        write_report(shown, path, controls=CONTROLS, examples=examples, title=title, retained=kept)
        self._console.print(results_table(shown), soft_wrap=True, highlight=False, markup=False)
        for name in (RESULTS_FILE, FRONTIER_FILE, REPORT_FILE, *([] if kept is None else [RETAINED_FILE])):
            self._console.print(f"{self.workdir / name}", soft_wrap=True)

    def _examples(self, labels: Sequence[str]) -> list[Example]:
        """The first samples with an image of every task, with each point's answer."""
        files = {label: (self._runner.folder(label) / ANSWERS_FILE).open() for label in labels}
        examples, taken = [], Counter()
        try:
            for sample in self._runner.questions.start_at(0):
                lines = {label: json.loads(next(file)) for label, file in files.items()}
                if sample.images and taken[sample.task] < EXAMPLES_PER_TASK:
                    taken[sample.task] += 1
                    spoken = {label: (line["text"], line["correct"]) for label, line in lines.items()}
                    examples.append(Example(sample.images[0], sample.question, sample.answer, sample.task, spoken))
                if all(taken[task] >= EXAMPLES_PER_TASK for task in self._settings.tasks):
                    break
        finally:
            for file in files.values():
                file.close()
        return examples


def _listed(refused: Sequence[RefusedPoint]) -> str:
    return "\n".join(f"  {point.label}: {point.reason}" for point in refused)

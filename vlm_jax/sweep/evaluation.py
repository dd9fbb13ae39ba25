"""Evaluates a release with training-free reducers at token budgets; resumes an interrupted run."""

import dataclasses
import itertools
import json
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import rich.console
from etils import epath
from flax import linen as nn

from vlm_jax.config import ConfigError, check_fields
from vlm_jax.evals.metrics import chosen_metrics
from vlm_jax.evals.paired import differences, told_differences
from vlm_jax.evals.predictions import check_parquet, write_parquet
from vlm_jax.evals.scores import Scores
from vlm_jax.evals.tally import Tally
from vlm_jax.evals.vqa import check_references, judged_answer
from vlm_jax.paths import absolute
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.loader import open_system
from vlm_jax.ranges import Count, Seed, Size
from vlm_jax.sweep.costs import first_with_images, flops, num_params
from vlm_jax.sweep.failures import Failures
from vlm_jax.sweep.frontier import draw_frontier
from vlm_jax.sweep.hard import DOWNSAMPLED, with_hard_questions
from vlm_jax.sweep.progress import PointsProgress
from vlm_jax.sweep.questions import Questions
from vlm_jax.sweep.release_points import RefusedPoint, ReleasePoint, list_release_points
from vlm_jax.sweep.report import Example, write_report
from vlm_jax.sweep.run import (
    ANSWERS_FILE,
    EXAMPLES_PER_TASK,
    FRONTIER_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    drawable,
    results_table,
)
from vlm_jax.system import System
from vlm_jax.train.claim import Claim
from vlm_jax.train.workdir import each_line, read_lines, write_lines, write_whole
from vlm_jax.types import Fields, Sample

CONTROLS = frozenset({"random", "uniform_stride", "downsample_image"})
COMMAND = "vlm_jax.cli.evaluate"
PARQUET_FILE, COMPARISON_FILE = "answers.parquet", "comparison.jsonl"

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ReleaseEvaluation:
    """Settings of an evaluation; the flags of `cli.evaluate`.

    Attributes:
      release: a released folder, or `organisation/name` on the Hugging Face hub.
      data: a file of conversations, see `data.stores` and `data.schemas`.
      reducers: names of `REDUCERS`; `none` is the release unchanged, and bounded by each budget if possible.
      budgets: visual tokens of an image.
      batch_size: prompts per batch.
      max_new_tokens: maximum tokens of an answer, including its end token.
      dtype: dtype of parameters and computation.
      num_samples: number of records to evaluate, sampled by the seed; None for all.
      seed: seed for sampling records.
      tasks: allowed values of a record's `task`; the first is the default.
      metrics: metrics as `task=name`, for tasks with another one than `evals.metrics.BY_TASK` says.
      parquet: whether the answers of a point are also written as `answers.parquet`.
      compare: the workdir of another evaluation, whose points of the same labels are compared with these, or the folder
        of one point, with which all are compared; None for neither.
    """

    release: str
    data: str
    reducers: tuple[str, ...]
    budgets: tuple[Size, ...] = ()
    batch_size: Size = 8
    max_new_tokens: Size = 32
    dtype: str = "float32"
    num_samples: Count | None = None
    seed: Seed = 0
    tasks: tuple[str, ...] = ("vqa",)
    metrics: tuple[str, ...] = ()
    parquet: bool = False
    compare: str | None = None

    def __post_init__(self):
        check_fields(self, "--")
        if not self.reducers or not self.tasks:
            raise ConfigError("--reducers, --tasks: expected at least one name each")
        chosen_metrics(self.metrics, "--metrics")
        if self.parquet:
            check_parquet("--parquet")
        if self.compare is not None and not _has_answers(epath.Path(absolute(self.compare))):
            raise ConfigError(
                f"--compare: expected the workdir of an evaluation, or a point's folder, got '{self.compare}'"
            )

    @property
    def chosen_metrics(self) -> dict[str, str]:
        """{task: name} of `metrics`."""
        return chosen_metrics(self.metrics, "--metrics")

    @property
    def of_answers(self) -> Fields:
        """The settings that answers and their scores depend on; `metrics` only where some are chosen."""
        settings = dataclasses.asdict(self)
        for name in ("parquet", "compare", *(() if self.metrics else ("metrics",))):
            del settings[name]
        return settings

    def command(self, workdir: str, point: ReleasePoint) -> str:
        """The command that evaluates only one point."""
        given = self.of_answers | {
            "reducers": (point.reducer,),
            "budgets": () if point.token_budget is None else (point.token_budget,),
            "workdir": f"{workdir}/{point.label}",
        }
        words = ["python", "-m", COMMAND]
        for name, value in given.items():
            if value is not None:
                value = ",".join(map(str, value)) if isinstance(value, tuple) else value
                words.append(f"--{name}={value}")
        return shlex.join(words)


class Evaluation:
    """One workdir's evaluation of a release.

    Args:
      settings: settings of the evaluation; other settings need another workdir.
      workdir: folder of the results, local or `gs://`.

    Raises:
      ConfigError, InfeasibleBudget, SequenceTooLong, MalformedRecords: before weights are read or anything is written.
    """

    def __init__(
        self, settings: ReleaseEvaluation, workdir: epath.PathLike, *, console: rich.console.Console | None = None
    ):
        self.workdir, self._settings = epath.Path(absolute(workdir)), settings
        self._console = console or rich.console.Console(markup=False)
        self._system = open_system(settings.release, FAMILIES, dtype=settings.dtype)
        self.points, self.refused = list_release_points(self._system, settings.reducers, settings.budgets)
        for refused in self.refused:
            self._console.print(f"{refused.label}: skipped: {refused.reason}", markup=False, soft_wrap=True)
        if not self.points:
            raise ConfigError(f"no point can be evaluated:\n{_listed(self.refused)}")
        self._shapes = nn.meta.unbox(self._system.boxed_shapes())
        processor = self._system.processor
        self._questions = Questions(
            settings.data,
            processor.views.channels,
            processor.frame_sampler,
            placeholders=processor.placeholders,
            tasks=settings.tasks,
            num_samples=settings.num_samples,
            seed=settings.seed,
        )
        references = self._questions.references()
        check_references(processor.tokenizer, references, settings.max_new_tokens, "--max_new_tokens")
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
        todo = [point for point in self.points if point.label not in results]
        failures = Failures(self.workdir, self._console)
        if todo:
            self._console.print(f"{len(todo)} points, {len(self._questions)} questions each")
            params = self._system.prepared(self._system.initial(jax.random.key(self._settings.seed)))
            asked = len(todo) * len(self._questions)
            with PointsProgress(self._console, "questions", asked, len(todo)) as progress:
                for point in todo:
                    with failures.noted(point.label):
                        results[point.label] = self._run_point(point, params, progress)
                    progress.next_point()
                    write_lines(self.workdir / RESULTS_FILE, results.values())
        ordered = [results[point.label] for point in self.points if point.label in results]
        if ordered:
            self._report(ordered)
            labels = [result["label"] for result in ordered]
            if self._settings.parquet:
                for folder in (self.workdir / "points" / label for label in labels):
                    write_parquet(each_line(folder / ANSWERS_FILE), folder / PARQUET_FILE)
            if self._settings.compare is not None:
                self._compare(labels)
        return failures.errors

    def _run_point(self, point: ReleasePoint, params: Any, progress: PointsProgress) -> Line:
        path = self._answers(point)
        tally, scores, start = resume(path, self._settings.chosen_metrics)
        if start > len(self._questions):
            raise ValueError(f"{path} has {start} answers to {len(self._questions)} questions; use another workdir")
        size, seconds = self._settings.batch_size, []
        progress.advance(point.label, start, point.label)
        # A partially written batch is answered again as a whole, so that its answers are the same.
        samples, skipped = self._questions.start_at(start - start % size), start % size
        while start < len(self._questions):
            begun = time.perf_counter()
            asked = list(itertools.islice(samples, size))
            lines = self._answer(point.system, params, asked)[skipped:]
            seconds.append((time.perf_counter() - begun) / (len(lines) + skipped))
            with path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
            for line in lines:
                tally.add(line)
                scores.add(line)
            start, skipped = start + len(lines), 0
            progress.advance(point.label, start, point.label)
        return {**self._result(point, tally, seconds), "scores": scores.result()}

    def _compare(self, labels: Sequence[str]) -> None:
        """Says and keeps how the points differ from those of `compare`."""
        assert self._settings.compare is not None
        other, lines = epath.Path(absolute(self._settings.compare)), []
        for label in labels:
            theirs = other if (other / ANSWERS_FILE).exists() else other / "points" / label
            if not (theirs / ANSWERS_FILE).exists():
                self._console.print(f"{label}: not compared: {theirs} has no answers", markup=False, soft_wrap=True)
                continue
            rows = each_line(self.workdir / "points" / label / ANSWERS_FILE), each_line(theirs / ANSWERS_FILE)
            found = differences(*rows, self._settings.chosen_metrics)
            lines += [{"label": label, "against": str(theirs), **dataclasses.asdict(one)} for one in found]
            self._console.print(
                "\n".join([f"{label} against {theirs}", *told_differences(found)]), markup=False, soft_wrap=True
            )
        write_lines(self.workdir / COMPARISON_FILE, lines)

    def _answer(self, system: System, params: Any, samples: list[Sample]) -> list[Line]:
        """Answers of a batch, padded by repeating its last sample."""
        processor, size = system.processor, self._settings.batch_size
        filled = samples + [samples[-1]] * (size - len(samples))
        answers = system.answer(
            params,
            [sample.messages[:-1] for sample in filled],
            [sample.images for sample in filled],
            [sample.videos for sample in filled],
            max_new_tokens=self._settings.max_new_tokens,
            names=[f"sample '{sample.sample_id}'" for sample in filled],
        )
        lines = []
        for sample, answer in zip(samples, answers, strict=False):
            sizes = [(image.shape[0], image.shape[1]) for image in sample.images]
            counts = processor.count_visual_tokens(sizes)
            score, response = judged_answer(self._settings.chosen_metrics, processor.tokenizer, sample, answer)
            lines.append(
                {
                    "sample_id": sample.sample_id,
                    "task": sample.task,
                    **dataclasses.asdict(response),
                    "correct": score,
                    "visual_tokens": counts,
                    "tokens_by_span": list(answer.visual_tokens) if counts else [],
                }
            )
        return lines

    def _result(self, point: ReleasePoint, tally: Tally, seconds: Sequence[float]) -> Line:
        """One line of `results.jsonl`, as of a sweep, with the reducer as `connector`.

        FLOPs are of the first sample, times exclude the batch that compiles.
        """
        sample = first_with_images(self._questions.start_at(0))
        batch = point.system.processor.batch([sample.messages[:-1]], [sample.images], [sample.videos])
        timed = seconds[1:]
        return {
            "label": point.label,
            "connector": point.reducer,
            "token_budget": point.token_budget,
            "num_visual_tokens": tally.left(point.system.model)[0],
            "realised_visual_tokens": tally.realised(),
            "accuracy": tally.accuracy(),
            "seconds_per_sample": sum(timed) / len(timed) if timed else None,
            "step_seconds": None,  # nothing is trained
            "peak_bytes": None,
            "num_params": num_params(self._shapes),
            "flops": flops(point.system.model, self._shapes, batch),
            "seed": self._settings.seed,
            "command": self._settings.command("workdir", point),
        }

    def _answers(self, point: ReleasePoint) -> epath.Path:
        folder = self.workdir / "points" / point.label
        folder.mkdir(parents=True, exist_ok=True)
        return folder / ANSWERS_FILE

    def _report(self, results: Sequence[Line]) -> None:

        def answers(label: str) -> Iterator[Fields]:
            return each_line(self.workdir / "points" / label / ANSWERS_FILE)

        shown = [drawable(line) for line in with_hard_questions(results, DOWNSAMPLED, answers)]
        draw_frontier(shown, self.workdir / FRONTIER_FILE, controls=CONTROLS)
        title = f"Visual token budgets: {self._settings.release}"
        examples = self._examples([result["label"] for result in results])
        write_report(shown, self.workdir / REPORT_FILE, controls=CONTROLS, examples=examples, title=title)
        self._console.print(results_table(shown), soft_wrap=True, highlight=False, markup=False)
        for name in (RESULTS_FILE, FRONTIER_FILE, REPORT_FILE):
            self._console.print(f"{self.workdir / name}", soft_wrap=True)

    def _examples(self, labels: Sequence[str]) -> list[Example]:
        """The first samples with an image of every task, with each point's answer."""
        files = {label: (self.workdir / "points" / label / ANSWERS_FILE).open() for label in labels}
        examples, taken = [], Counter()
        try:
            for sample in self._questions.start_at(0):
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


def resume(path: epath.Path, metrics: Mapping[str, str]) -> tuple[Tally, Scores, int]:
    """The counts of a file's complete lines, and their number; removes a truncated last line from the file."""
    tally, scores, count, size, whole = Tally(), Scores(metrics), 0, 0, 0
    if not path.exists():
        return tally, scores, 0
    with path.open("rb") as file:
        for line in file:
            size += len(line)
            if line.endswith(b"\n"):
                row = json.loads(line)
                tally.add(row)
                scores.add(row)
                count, whole = count + 1, size
    if whole < size:
        write_whole(path, path.read_bytes()[:whole].decode())
    return tally, scores, count


def _has_answers(folder: epath.Path) -> bool:
    """Whether a folder is that of a point, or of an evaluation with points."""
    return (folder / ANSWERS_FILE).exists() or (folder / RESULTS_FILE).exists()


def _listed(refused: Sequence[RefusedPoint]) -> str:
    return "\n".join(f"  {point.label}: {point.reason}" for point in refused)

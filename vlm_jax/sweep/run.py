"""Runs a sweep: the shared stages once, then every point; resumes where it was interrupted."""

import functools
import shlex
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import rich.console
from etils import epath

from vlm_jax.config import config_hash
from vlm_jax.paths import absolute
from vlm_jax.sharding.processes import is_primary
from vlm_jax.sweep.executor import Executor, LocalExecutor, Task
from vlm_jax.sweep.failures import Failures
from vlm_jax.sweep.frontier import combine_seeds, draw_frontier, tasks_of, told_seeds
from vlm_jax.sweep.halving import Halving, stopped_at, told
from vlm_jax.sweep.hard import DOWNSAMPLED, with_hard_questions
from vlm_jax.sweep.point_run import ANSWERS_FILE, PointRunner, shared_name
from vlm_jax.sweep.points import Point, list_points, shared_config, sweep_settings
from vlm_jax.sweep.progress import PointsProgress, text_table
from vlm_jax.sweep.release_points import AS_RELEASED
from vlm_jax.sweep.report import Example, write_report
from vlm_jax.sweep.retained import RETAINED_FILE, retained, write_retained
from vlm_jax.sweep.rows import RESULTS_FILE, run_points
from vlm_jax.sweep.search import DRAW
from vlm_jax.train.claim import Claim
from vlm_jax.train.loop import Outcome
from vlm_jax.train.workdir import each_line, read_lines
from vlm_jax.types import Fields, Sample

FRONTIER_FILE, REPORT_FILE = "frontier.png", "report.html"
EXAMPLES_PER_TASK = 4


class Sweep:
    """One workdir's sweep.

    Args:
      config: `base`, `candidates` and `sweep`; see `configs/sweeps`.
      workdir: folder of the sweep, local or `gs://`.
      only: labels of the points to run; all when empty. They may differ between runs of one workdir.
      config_path: path of the config, for the commands that reproduce points.
      overrides: command-line overrides of the config, for the same.
      console: where progress and tables are printed.
      executor: where points are run; in this process if None.

    Attributes:
      points: what is run.
      failed: {label: error} of the points that failed in the last `run`.
      stopped: {label: where} of the points that `config.sweep.halving` has stopped, which have no row.

    Raises:
      ConfigError, InfeasibleBudget: before anything is written.
    """

    def __init__(
        self,
        config: Any,
        workdir: epath.PathLike,
        *,
        config_path: str,
        only: tuple[str, ...] = (),
        overrides: tuple[str, ...] = (),
        console: rich.console.Console | None = None,
        executor: Executor | None = None,
    ):
        self.workdir = epath.Path(absolute(workdir))
        self._config, self._config_path, self._overrides = config, config_path, overrides
        self._console = console or rich.console.Console(markup=False)
        self._settings = sweep_settings(config)
        self.failed: dict[str, str] = {}
        self.stopped: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self.points = list_points(config, only, self._refused)
        self._executor = executor or LocalExecutor()
        self._runner = PointRunner(config.base, self._settings.shared, self.workdir)
        if self._executor.in_process:
            _ = self._runner.mesh  # a wrong number of devices is found before anything is written
        self._claim = Claim(self.workdir, config)

    def run(self) -> list[dict[str, Any]]:
        """Trains and evaluates what is not finished, then draws the frontier and writes the report.

        A point that fails is named in `failed` and `failed.jsonl`, and the others go on.

        Returns:
          One dict per finished point, as in `results.jsonl`.

        Raises:
          WorkdirInUse: another process sweeps in the workdir.
        """
        with self._claim.held():
            self._claim.record()
            return self._run()

    def _run(self) -> list[dict[str, Any]]:
        self._print(plan_table(self.points))
        for point in self.points:
            if point.drawn:
                self._print(f"{point.label}: {', '.join(f'{key}={value}' for key, value in point.drawn.items())}")
        results = {line["label"]: line for line in read_lines(self.workdir / RESULTS_FILE)}
        self._check_results(results)
        failures = Failures(self.workdir, self._console)
        self.failed, self.stopped = failures.errors, failures.stopped
        todo = [point for point in self.points if point.label not in results]
        if self._settings.halving is not None:
            for point in todo:
                if (line := stopped_at(self._runner.folder(point.trained_as))) is not None:
                    failures.add_stopped(point.label, told(line))
            todo = [point for point in todo if point.label not in self.stopped]
        for label, error in self._refused.items():
            failures.add(label, error)
        if todo:
            labels, untimed = [point.label for point in todo], ChainMap(self.failed, self.stopped)
            tasks = self._tasks(todo, Timing(results.values(), untimed))
            with self._progress(todo) as progress:
                run_points(self._executor, tasks, labels, results, failures, self._claim, progress)
        ordered = [results[point.label] for point in self.points if point.label in results]
        if ordered:
            self._show(ordered)
        return ordered

    def _tasks(self, todo: list[Point], timing: "Timing") -> Iterator[Task]:
        """The shared stages of every seed, then the points; those of one training follow each other."""
        before: dict[str, str] = {}  # label of the newest point of a training
        if self._settings.shared:
            for seed in dict.fromkeys(point.config.seed for point in todo):
                yield Task(shared_name(seed), functools.partial(self._runner.train_shared, seed))
        several = Counter(point.trained_as for point in self.points)
        for number, point in enumerate(todo, start=1):
            name, rest = point.trained_as, {other.trained_as for other in todo[number:]}
            after = [shared_name(point.config.seed)] if self._settings.shared else []
            if point.config.schedule and name in before:
                after.append(before[name])
            before[name] = point.label
            run = functools.partial(
                self._runner.run,
                point,
                command=self._command(point),
                timed=timing.is_due(point),
                keep=name in rest or (not rest and several[name] > 1),
                halving=self._halving(point),
            )
            yield Task(point.label, run, tuple(after))

    def _halving(self, point: Point) -> Halving | None:
        """The rungs of a point's training, which is compared with those at the same budget."""
        settings, budget = self._settings.halving, point.training[0].token_budget
        if settings is None or not point.config.schedule:
            return None
        others = [other for other in self.points if other.config.schedule and other.trained_as != point.trained_as]
        same = dict.fromkeys(other.trained_as for other in others if other.training[0].token_budget == budget)
        return self._runner.halving(point.trained_as, settings, tuple(same))

    @property
    def num_points(self) -> int:
        """Points that were asked for, with those that cannot be built."""
        return len(self.points) + len(self._refused)

    def outcome(self, label: str) -> Outcome:
        """Parameters and costs of a point, from its last checkpoint, after training its remaining steps.

        Raises:
          KeyError: the sweep has no such point.
        """
        point = {point.label: point for point in self.points}[label]
        several = sum(other.trained_as == point.trained_as for other in self.points) > 1
        with self._progress([point]) as progress:
            if self._settings.shared:
                self._runner.train_shared(point.config.seed, progress.advance)
            return self._runner.train(point, progress.advance, keep=several)

    @property
    def _downsampled(self) -> str | None:
        """The control that downsamples the picture."""
        kinds = {label: self._config.candidates[label].get("reducer", {}) for label in self._settings.controls}
        return next((label for label, reducer in kinds.items() if reducer.get("kind") == DOWNSAMPLED), None)

    def _answers(self, label: str) -> Iterator[Fields]:
        return each_line(self._runner.folder(label) / ANSWERS_FILE)

    def _command(self, point: Point) -> str:
        words = ["python", "-m", "vlm_jax.cli.sweep", f"--config={self._config_path}", *self._overrides]
        return shlex.join([*words, f"--only={point.label}", f"--workdir=workdir/{point.label}"])

    def _check_results(self, results: dict[str, dict[str, Any]]) -> None:
        """Checks that finished points have the configs that they would have now."""
        for point in self.points:
            line = results.get(point.label)
            if line is not None and line["config_hash"] != config_hash(point.config):
                raise ValueError(
                    f"{self.workdir / RESULTS_FILE}: point {point.label} has config {line['config_hash']}, expected "
                    f"{config_hash(point.config)}; the package builds points differently now. Use another "
                    "--workdir"
                )

    def _show(self, results: list[dict[str, Any]]) -> None:
        """The table on the console, and the files of the primary process."""
        if is_primary():
            shown = [drawable(result) for result in with_hard_questions(results, self._downsampled, self._answers)]
            own = (point.connector for point in self.points)
            controls = frozenset(name for name in own if name.partition(DRAW)[0] in self._settings.controls)
            draw_frontier(shown, self.workdir / FRONTIER_FILE, controls=controls)
            title = f"Visual token budgets: {self._config_path}"
            kept = retained(combine_seeds(shown), self._answers, self._runner.metrics, controls)
            write_retained(kept, self.workdir / RETAINED_FILE)
            path, examples = self.workdir / REPORT_FILE, self._examples()
            write_report(shown, path, controls=controls, examples=examples, title=title, retained=kept)
        self._print(results_table([drawable(result) for result in results]))
        for name in (RESULTS_FILE, FRONTIER_FILE, REPORT_FILE, RETAINED_FILE):
            if name != RETAINED_FILE or (self.workdir / name).exists():
                self._print(f"{self.workdir / name}")

    def _print(self, text: str) -> None:
        """Text as it is: no name is cut, wrapped or read as markup."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _examples(self) -> list[Example]:
        """The first samples of every task, with each point's answer."""
        point, shown = self.points[0], dict[str, Sample]()
        taken = dict.fromkeys(point.experiment.source.tasks, 0)
        for sample in point.experiment.open_source().evaluation(point.config.seed):
            if sample.images and taken[sample.task] < EXAMPLES_PER_TASK:
                taken[sample.task] += 1
                shown[sample.sample_id] = sample
            if min(taken.values()) >= EXAMPLES_PER_TASK:
                break
        spoken: dict[str, dict[str, tuple[str, bool | float]]] = {name: {} for name in shown}
        for other in self.points:
            for line in self._answers(other.label):
                if line["sample_id"] in shown:
                    spoken[line["sample_id"]][other.label] = line["text"], line["correct"]
        return [
            Example(sample.images[0], sample.question, sample.answer, sample.task, spoken[name])
            for name, sample in shown.items()
            if spoken[name]
        ]

    def _progress(self, todo: list[Point]) -> PointsProgress:
        steps = {point.trained_as: _num_steps(point.training[0]) for point in todo}
        if self._settings.shared:
            for seed in dict.fromkeys(point.config.seed for point in todo):
                shared = shared_config(self._config.base, seed, self._settings.shared)
                steps[shared_name(seed)] = _num_steps(shared)
        return PointsProgress(self._console, "steps", sum(steps.values()), len(todo))


class Timing:
    """Which points are timed: of those that differ in their seed one, since times do not depend on it.

    Args:
      results: rows of finished points.
      failed: {label: error} of the points that failed or were stopped, which have no times.
    """

    def __init__(self, results: Iterable[Fields], failed: Mapping[str, str]):
        timed = [line for line in results if "prefill_seconds" in line]
        self._timed = {(line["connector"], line["token_budget"]): line["label"] for line in timed}
        self._failed = failed

    def is_due(self, point: Point) -> bool:
        """Whether the point is to be timed; the next one that differs only in its seed then is not."""
        of_point = (point.connector, point.config.token_budget)
        if self._timed.get(of_point) in (None, *self._failed):
            self._timed[of_point] = point.label
        return self._timed[of_point] == point.label


def _num_steps(config: Any) -> int:
    return sum(config.stages[label].steps for label in config.schedule)


def plan_table(points: list[Point]) -> str:
    """The planned points with their costs: parameters and FLOPs of the encoder, the connector and the decoder."""
    rows: list[tuple[str, ...]] = [("point", "tokens", "params, k: enc", "con", "dec", "MFLOPs: enc", "con", "dec")]
    for point in points:
        params, flops = point.costs.num_params, point.costs.flops
        counts = [f"{params[part] / 1e3:,.0f}" for part in ("encoder", "connector", "decoder")]
        counts += [f"{flops[part] / 1e6:,.1f}" for part in ("encoder", "connector", "prefill")]
        rows.append((point.label, str(point.costs.num_visual_tokens), *counts))
    return text_table(f"{len(points)} points, by shape", rows)


def drawable(result: dict[str, Any]) -> dict[str, Any]:
    """A line of `results.jsonl` as the frontier and the report take it: without a budget it is as released."""
    return {**result, "token_budget": AS_RELEASED if result["token_budget"] is None else result["token_budget"]}


def results_table(results: list[dict[str, Any]]) -> str:
    """Accuracy of every point in percent, task by task, the mean over its seeds with its interval."""
    points, tasks = combine_seeds(results), tasks_of(results)
    rows: list[tuple[str, ...]] = [("point", "tokens", *tasks)]
    for point in points:
        cells = []
        for task in tasks:
            share = point.accuracy.get(task)
            cells.append(
                f"{100 * share.mean:.0f} {100 * share.low:.0f}-{100 * share.high:.0f}" if share is not None else ""
            )
        rows.append((point.label, f"{point.costs['tokens']:g}", *cells))
    return text_table(f"accuracy on unseen data in %, with 95% intervals ({told_seeds(points)})", rows)

"""Runs a sweep: the shared stages once, then every point; resumes where it was interrupted."""

import json
import shlex
from collections.abc import Iterator
from typing import Any

import rich.console
from etils import epath

from vlm_jax.build import build
from vlm_jax.build.settings import EvaluationSettings
from vlm_jax.config import config_hash, parse
from vlm_jax.evals.metrics import chosen_metrics
from vlm_jax.evals.scores import SCORED, Scores
from vlm_jax.evals.tally import Tally
from vlm_jax.evals.timing import generation_seconds
from vlm_jax.evals.vqa import answers
from vlm_jax.paths import absolute
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.sharding.processes import is_primary
from vlm_jax.sweep.failures import Failures
from vlm_jax.sweep.frontier import combine_seeds, draw_frontier, tasks_of, told_seeds
from vlm_jax.sweep.hard import DOWNSAMPLED, with_hard_questions
from vlm_jax.sweep.points import Point, list_points, shared_config, sweep_settings
from vlm_jax.sweep.progress import PointsProgress, text_table
from vlm_jax.sweep.release_points import AS_RELEASED
from vlm_jax.sweep.report import Example, write_report
from vlm_jax.train.claim import Claim
from vlm_jax.train.loop import Outcome, Progress, Trainer, first_params
from vlm_jax.train.workdir import each_line, read_lines, whole_file, write_lines
from vlm_jax.types import Fields, Sample

RESULTS_FILE, FRONTIER_FILE, REPORT_FILE = "results.jsonl", "frontier.png", "report.html"
ANSWERS_FILE = "answers.jsonl"
EXAMPLES_PER_TASK = 4


class Sweep:
    """One workdir's sweep.

    Args:
      config: `base`, `candidates` and `sweep`; see `configs/sweeps`.
      workdir: folder of the sweep, local or `gs://`.
      only: labels of the points to run; all when empty. They may differ between runs of one workdir.
      config_path: path of the config, for the commands that reproduce points.
      overrides: command-line overrides of the config, for the same.

    Attributes:
      points: what is run.
      failed: {label: error} of the points that failed in the last `run`.

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
    ):
        self.workdir = epath.Path(absolute(workdir))
        self._config, self._config_path, self._overrides = config, config_path, overrides
        self._console = console or rich.console.Console(markup=False)
        self._settings = sweep_settings(config)
        self._outcomes: dict[str, Outcome] = {}
        self.failed: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self.points = list_points(config, only, self._refused)
        evaluation = parse(EvaluationSettings, config.base.evaluation, "config.base.evaluation")
        self._metrics = chosen_metrics(evaluation.metrics, "config.base.evaluation.metrics")
        self._mesh = make_mesh(parse(MeshSettings, config.base.mesh, "config.base.mesh"))
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
        results = {line["label"]: line for line in read_lines(self.workdir / RESULTS_FILE)}
        self._check_results(results)
        todo = [point for point in self.points if point.label not in results]
        failures = Failures(self.workdir, self._console)
        self.failed = failures.errors
        for label, error in self._refused.items():
            failures.add(label, error)
        if todo:
            with self._progress(todo) as progress:
                seeds = dict.fromkeys(point.config.seed for point in todo)
                starts = {seed: self._train_shared(seed, progress) for seed in seeds}
                for number, point in enumerate(todo, start=1):
                    with failures.noted(point.label):
                        start = starts[point.config.seed]
                        results[point.label] = self._run_point(point, start, progress, _is_timed(point, results))
                    write_lines(self.workdir / RESULTS_FILE, results.values())
                    progress.next_point()
                    rest = {other.trained_as for other in todo[number:]}
                    if rest and point.trained_as not in rest:  # the next point has parameters of its own
                        self._outcomes.pop(point.trained_as, None)
        ordered = [results[point.label] for point in self.points if point.label in results]
        if ordered:
            self._show(ordered)
        return ordered

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
        with self._progress([point]) as progress:
            return self._train_point(point, self._train_shared(point.config.seed, progress), progress)

    def _train_shared(self, seed: int, progress: PointsProgress) -> epath.Path | None:
        """Checkpoint directory of the shared stages for a seed, which are trained if needed."""
        if not self._settings.shared:
            return None
        config = shared_config(self._config.base, seed, self._settings.shared)
        name = _shared_name(seed)
        report = self._reports(progress, name)
        trainer = Trainer(config, build(config), self._mesh, self.workdir / name, progress=report)
        if not trainer.finished():  # else its parameters need not be read, nor its step compiled
            trainer.run()
        return self.workdir / name / "checkpoints"

    @property
    def _downsampled(self) -> str | None:
        """The control that downsamples the picture."""
        kinds = {label: self._config.candidates[label].get("reducer", {}) for label in self._settings.controls}
        return next((label for label, reducer in kinds.items() if reducer.get("kind") == DOWNSAMPLED), None)

    def _answers(self, label: str) -> Iterator[Fields]:
        return each_line(self._folder(label) / ANSWERS_FILE)

    def _folder(self, label: str) -> epath.Path:
        return self.workdir / "points" / label

    def _train_point(self, point: Point, start: epath.Path | None, progress: PointsProgress) -> Outcome:
        """The run that the point's parameters are from, none where it trains nothing; what points share is kept."""
        label, (config, experiment) = point.trained_as, point.training
        if label in self._outcomes:
            return self._outcomes[label]
        given: Any = {"init_from": start, "init_parts": point.start}
        if config.schedule:
            folder, report = self._folder(label), self._reports(progress, label)
            outcome = Trainer(config, experiment, self._mesh, folder, **given, progress=report).run()
        else:
            outcome = Outcome(first_params(experiment, self._mesh, config.seed, **given), None, None)
        if sum(other.trained_as == label for other in self.points) > 1:
            self._outcomes[label] = outcome
        return outcome

    def _run_point(
        self, point: Point, start: epath.Path | None, progress: PointsProgress, is_timed: bool
    ) -> dict[str, Any]:
        """The result of a point; its answers are timed unless they are already, with another seed."""
        outcome = self._train_point(point, start, progress)
        evaluation = parse(EvaluationSettings, point.config.evaluation, "config.evaluation")
        samples = point.experiment.open_source().evaluation(point.config.seed)
        tally, scores = Tally(), Scores(self._metrics)
        with whole_file(self._folder(point.label) / ANSWERS_FILE) as file:
            for answer in answers(point.experiment, outcome.params, samples, evaluation):
                tally.add(vars(answer))
                scores.add(vars(answer))
                kept = {name: getattr(answer, name) for name in ("sample_id", "correct", *SCORED)}
                file.write(json.dumps(kept) + "\n")
        times = {} if is_timed else generation_seconds(point.experiment, outcome.params, samples, evaluation)
        return {**self._result(point, outcome, tally, times), "scores": scores.result()}

    def _result(self, point: Point, outcome: Outcome, tally: Tally, times: dict[str, float]) -> dict[str, Any]:
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
            "config_hash": config_hash(point.config),
            "command": self._command(point),
        }

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
            controls = frozenset(self._settings.controls)
            draw_frontier(shown, self.workdir / FRONTIER_FILE, controls=controls)
            title = f"Visual token budgets: {self._config_path}"
            write_report(shown, self.workdir / REPORT_FILE, controls=controls, examples=self._examples(), title=title)
        self._print(results_table([drawable(result) for result in results]))
        for name in (RESULTS_FILE, FRONTIER_FILE, REPORT_FILE):
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
                steps[_shared_name(seed)] = _num_steps(shared)
        return PointsProgress(self._console, "steps", sum(steps.values()), len(todo))

    @staticmethod
    def _reports(progress: PointsProgress, run: str) -> Progress:
        """The callback of a run's steps."""

        def report(step: int, steps: int, metrics: Fields) -> None:
            progress.advance(run, step, f"{run}: {metrics['stage']}, loss {metrics['loss']:.3f}")

        return report


def _is_timed(point: Point, results: dict[str, dict[str, Any]]) -> bool:
    """Whether a result of the point has times, with whichever seed: they do not depend on it."""
    same = (point.connector, point.config.token_budget)
    of_point = [line for line in results.values() if (line["connector"], line["token_budget"]) == same]
    return any("prefill_seconds" in line for line in of_point)


def _shared_name(seed: int) -> str:
    """The run of the shared stages, and its folder."""
    return f"shared_{seed}"


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

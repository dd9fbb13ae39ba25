"""Evaluates one point of a release, in the folder of the point; resumes behind its last whole line."""

import dataclasses
import functools
import itertools
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh

from vlm_jax.config import ConfigError, check_fields
from vlm_jax.data.conversations import Turns
from vlm_jax.evals.metrics import chosen_metrics
from vlm_jax.evals.predictions import check_parquet
from vlm_jax.evals.scores import Scores
from vlm_jax.evals.tally import Tally
from vlm_jax.evals.vqa import check_references, judged_answer, num_turns
from vlm_jax.paths import absolute
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.loader import open_system
from vlm_jax.ranges import Count, Seed, Size
from vlm_jax.reducers import REDUCERS
from vlm_jax.reducers.reducer import WhichQuestion
from vlm_jax.sharding.mesh import make_generation_mesh, parse_generation_mesh
from vlm_jax.sweep.costs import first_with_images, flops, num_params
from vlm_jax.sweep.executor import Report, exclusive
from vlm_jax.sweep.point_run import ANSWERS_FILE
from vlm_jax.sweep.questions import Questions
from vlm_jax.sweep.release_points import ReleasePoint, is_guided, list_release_points
from vlm_jax.sweep.rows import RESULTS_FILE
from vlm_jax.system import System
from vlm_jax.train.workdir import write_whole
from vlm_jax.types import Fields, Params, Sample

COMMAND = "vlm_jax.cli.evaluate"

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
      mesh: devices along the axes of a mesh, see `sharding.mesh.parse_generation_mesh`; one device when None.
      num_samples: number of records to evaluate, sampled by the seed; None for all.
      seed: seed for sampling records.
      turns: which questions of a conversation are asked, `last` or `all`, each after the record's own answers to those
        before it; see `data.conversations.answers_of`.
      tasks: allowed values of a record's `task`; the first is the default.
      metrics: metrics as `task=name`, for tasks with another one than `evals.metrics.BY_TASK` says.
      parquet: whether the answers of a point are also written as `answers.parquet`.
      compare: the workdir of another evaluation, whose points of the same labels are compared with these, or the folder
        of one point, with which all are compared; None for neither.
      text_model: of the reducers that choose by the question: folder of the CLIP whose image tower the release has, or
        its name on the hub; the tower that the release's config names when None.
      question: likewise, which question of a conversation chooses; their own default when None.
      enable_thinking: whether the model may think first, where its chat template has this variable; the template's
        default when None.
    """

    release: str
    data: str
    reducers: tuple[str, ...]
    budgets: tuple[Size, ...] = ()
    batch_size: Size = 8
    max_new_tokens: Size = 32
    dtype: str = "float32"
    mesh: str | None = None
    num_samples: Count | None = None
    seed: Seed = 0
    turns: Turns = "last"
    tasks: tuple[str, ...] = ("vqa",)
    metrics: tuple[str, ...] = ()
    parquet: bool = False
    compare: str | None = None
    text_model: str | None = None
    question: WhichQuestion | None = None
    enable_thinking: bool | None = None

    def __post_init__(self):
        check_fields(self, "--")
        if not self.reducers or not self.tasks:
            raise ConfigError("--reducers, --tasks: expected at least one name each")
        chosen_metrics(self.metrics, "--metrics")
        if self.mesh is not None:
            parse_generation_mesh(self.mesh, "--mesh")
        if self.guidance and not any(map(is_guided, self.reducers)):
            flags, guided = ", ".join(f"--{name}" for name in self.guidance), ", ".join(filter(is_guided, REDUCERS))
            raise ConfigError(
                f"{flags}: none of --reducers={','.join(self.reducers)} chooses by the question; add one that does "
                f"({guided}) to --reducers, or leave {flags} out"
            )
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
    def guidance(self) -> dict[str, str]:
        """The fields of reducers that choose by the question, where they are set."""
        given = {"text_model": self.text_model, "question": self.question}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def of_answers(self) -> Fields:
        """The settings that answers and their scores depend on; others that were added only where they are set."""
        settings = dataclasses.asdict(self)
        unset = [name for name in ("metrics", "text_model", "question") if not settings[name]]
        unset += ["turns"] if self.turns == "last" else []
        unset += ["enable_thinking"] if self.enable_thinking is None else []
        for name in ("mesh", "parquet", "compare", *unset):
            del settings[name]
        return settings

    def command(self, workdir: str, point: ReleasePoint) -> str:
        """The command that evaluates only one point."""
        given = self.of_answers | {
            "reducers": (point.reducer,),
            "budgets": () if point.token_budget is None else (point.token_budget,),
            "workdir": f"{workdir}/{point.label}",
            "mesh": self.mesh,
        }
        if not is_guided(point.reducer):
            given = {name: value for name, value in given.items() if name not in self.guidance}
        words = ["python", "-m", COMMAND]
        for name, value in given.items():
            if value is not None:
                value = ",".join(map(str, value)) if isinstance(value, tuple) else value
                words.append(f"--{name}={value}")
        return shlex.join(words)


class ReleaseRunner:
    """Evaluates points of one release in this process; pickled, it is made anew in the process of a worker.

    Args:
      settings: settings of the evaluation.
      workdir: folder of the results.

    Attributes:
      points, refused: as of `list_release_points`.
      questions: what is asked.

    Raises:
      ConfigError, InfeasibleBudget, SequenceTooLong, MalformedRecords: before weights are read or anything is written.
    """

    def __init__(self, settings: ReleaseEvaluation, workdir: epath.PathLike):
        self._settings, self._workdir = settings, epath.Path(workdir)
        system = open_system(settings.release, FAMILIES, dtype=settings.dtype)
        self._system = system.thinking(settings.enable_thinking)
        asked = settings.reducers, settings.budgets, settings.guidance
        self.points, self.refused = list_release_points(self._system, *asked)
        self._shapes = nn.meta.unbox(self._system.boxed_shapes())
        self._borrowed: dict[tuple[str, ...], Params] = {}
        processor = self._system.processor
        self.questions = Questions(
            settings.data,
            processor.views.channels,
            processor.frame_sampler,
            placeholders=processor.placeholders,
            tasks=settings.tasks,
            num_samples=settings.num_samples,
            seed=settings.seed,
            turns=settings.turns,
        )

    def __reduce__(self):
        return kept_runner, (self._settings, str(self._workdir))

    def check_references(self) -> None:
        """Checks that every reference can be answered.

        Raises:
          SequenceTooLong: one is longer than an answer may be.
        """
        references, longest = self.questions.references(), self._settings.max_new_tokens
        check_references(self._system.processor.tokenizer, references, longest, "--max_new_tokens")

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """The mesh of `settings.mesh`, of the devices of the process that evaluates points: a worker may have others.

        Raises:
          ConfigError: as of `make_mesh`.
        """
        return None if self._settings.mesh is None else make_generation_mesh(self._settings.mesh, "--mesh")

    @functools.cached_property
    def params(self) -> Any:
        """Parameters of the release, for all points; kept in memory."""
        return self._system.prepared(self._system.initial(jax.random.key(self._settings.seed), self.mesh))

    def params_of(self, system: System) -> Any:
        """Parameters of a point: the release's, and those that its reducer reads of another checkpoint, also kept."""
        others = () if system.release is None else system.release.borrowed
        origins = tuple(other.checkpoint.origin for other in others)
        if origins not in self._borrowed:
            self._borrowed[origins] = system.borrowed(self.params) if origins else {}
        return self.params | self._borrowed[origins]

    def folder(self, label: str) -> epath.Path:
        """The folder of a point."""
        return self._workdir / "points" / label

    def run(self, label: str, report: Report) -> Line:
        """Asks a point the questions that it has not answered.

        Args:
          label: of the point.
          report: is told the questions.

        Returns:
          The row of `results.jsonl`.

        Raises:
          WorkdirInUse: another process evaluates the point.
          ValueError: more answers than questions are there.
        """
        point = {point.label: point for point in self.points}[label]
        with exclusive(self.folder(label)) as confirm:
            return self._run(point, report, confirm)

    def _run(self, point: ReleasePoint, report: Report, confirm: Callable[[], None]) -> Line:
        path = self.folder(point.label) / ANSWERS_FILE
        tally, scores, start = resume(path, self._settings.chosen_metrics)
        if start > len(self.questions):
            raise ValueError(f"{path} has {start} answers to {len(self.questions)} questions; use another workdir")
        size, seconds = self._settings.batch_size, []
        report(point.label, start, point.label)
        # A partially written batch is answered again as a whole, so that its answers are the same.
        samples, skipped = self.questions.start_at(start - start % size), start % size
        while start < len(self.questions):
            begun = time.perf_counter()
            asked = list(itertools.islice(samples, size))
            lines = self._answer(point.system, asked)[skipped:]
            seconds.append((time.perf_counter() - begun) / (len(lines) + skipped))
            confirm()
            with path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
            for line in lines:
                tally.add(line)
                scores.add(line)
            start, skipped = start + len(lines), 0
            report(point.label, start, point.label)
        return {**self._result(point, tally, seconds), "scores": scores.result()}

    def _answer(self, system: System, samples: list[Sample]) -> list[Line]:
        """Answers of a batch, padded by repeating its last sample."""
        processor, size = system.processor, self._settings.batch_size
        filled = samples + [samples[-1]] * (size - len(samples))
        answers = system.answer(
            self.params_of(system),
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
                    "turns": num_turns(sample),
                    "visual_tokens": counts,
                    "tokens_by_span": list(answer.visual_tokens) if counts else [],
                }
            )
        return lines

    def _result(self, point: ReleasePoint, tally: Tally, seconds: Sequence[float]) -> Line:
        """One line of `results.jsonl`, as of a sweep, with the reducer as `connector`.

        FLOPs are of the first sample, times exclude the batch that compiles.
        """
        sample = first_with_images(self.questions.start_at(0))
        batch = point.system.processor.batch([sample.messages[:-1]], [sample.images], [sample.videos])
        shapes = self._shapes
        if point.system.release is not None and point.system.release.borrowed:
            shapes = nn.meta.unbox(point.system.boxed_shapes())
        timed = seconds[1:]
        model: Any = point.system.model
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
            "num_params": num_params(shapes),
            "flops": flops(point.system.model, shapes, batch),
            "seed": self._settings.seed,
            **({"question": model.reducer.question} if is_guided(point.reducer) else {}),
            "command": self._settings.command("workdir", point),
        }


@functools.lru_cache(maxsize=1)
def kept_runner(settings: ReleaseEvaluation, workdir: str) -> ReleaseRunner:
    """The runner of a worker, which keeps the parameters for the next point."""
    return ReleaseRunner(settings, workdir)


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

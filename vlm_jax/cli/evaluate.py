"""python -m vlm_jax.cli.evaluate --release=DIR --data=FILE --reducers=none,visionzip --budgets=64,16 --workdir=DIR

Asks a release the questions of a file with every reducer and budget, and writes accuracy against visual tokens as
`results.jsonl`, `frontier.png` and `report.html`. Nothing is trained; rerunning the command resumes.
"""

import sys
from typing import cast, get_args

from absl import app, flags

from vlm_jax.cli import executors, mesh, numbers
from vlm_jax.cli.process import explained, keep_programs, quieten, show_flags
from vlm_jax.data.conversations import Turns
from vlm_jax.pretrained.loader import DTYPES
from vlm_jax.ranges import Count, Seed, Size
from vlm_jax.reducers.reducer import WhichQuestion
from vlm_jax.sweep.evaluation import Evaluation, ReleaseEvaluation
from vlm_jax.sweep.failures import summary
from vlm_jax.train.loop import Interrupted

RELEASE = flags.DEFINE_string(
    "release",
    None,
    "A released folder, organisation/name on the Hugging Face hub, or the workdir of a run that started from one.",
)
DATA = flags.DEFINE_string("data", None, "A file of conversations: LLaVA's JSON, JSONL, parquet, …; see --turns.")
REDUCERS = flags.DEFINE_list(
    "reducers", ["none"], "Training-free token reducers; none is the release unchanged, and bounded by each budget."
)
BUDGETS = flags.DEFINE_list("budgets", [], "Visual tokens per image for each reducer.")
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the results, local or gs://; created if missing.")
BATCH_SIZE = numbers.define("batch_size", Size, 8, "Prompts per batch.")
MAX_NEW_TOKENS = numbers.define("max_new_tokens", Size, 32, "Maximum tokens of an answer.")
DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(DTYPES), "Dtype of parameters and computation.")
MESH = mesh.define()
NUM_SAMPLES = numbers.define(
    "num_samples", Count, None, "Number of records to evaluate, sampled by --seed; all if unset."
)
SEED = numbers.define("seed", Seed, 0, "Seed for sampling records.")
TURNS = flags.DEFINE_enum(
    "turns",
    "last",
    get_args(Turns),
    "Which questions of a conversation are asked, each after the record's own answers to those before it.",
)
TASKS = flags.DEFINE_list("tasks", ["vqa"], "Allowed values of a record's task; the first is the default.")
ENABLE_THINKING = flags.DEFINE_boolean(
    "enable_thinking",
    None,
    "Whether the model may think first, if its chat template has this variable; its default if unset.",
)
METRICS = flags.DEFINE_list("metrics", [], "Metrics of tasks, as task=metric; by the task's name if unset.")
PARQUET = flags.DEFINE_bool("parquet", False, "Also writes the answers of each point as answers.parquet.")
COMPARE = flags.DEFINE_string(
    "compare",
    None,
    "The workdir of another evaluation of the same data, or the folder of one of its points: says how all metrics "
    "differ, with intervals and p-values.",
)
TEXT_MODEL = flags.DEFINE_string(
    "text_model",
    None,
    "Of reducers that choose by the question: the CLIP whose image tower the release has, its folder or its name on "
    "the Hugging Face hub; unset where the release's config names it.",
)
QUESTION = flags.DEFINE_enum(
    "question",
    None,
    get_args(WhichQuestion),
    "Of the same: which question of a conversation chooses; the first one if unset.",
)


def main(argv: list[str]) -> None:
    """Evaluates every point; see `vlm_jax.sweep.evaluation`. Exit status 1 where a point failed."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument: {argv[1]}")
    keep_programs()
    quieten()
    try:
        with explained(OSError):
            settings = ReleaseEvaluation(
                release=str(RELEASE.value),
                data=str(DATA.value),
                reducers=tuple(REDUCERS.value),
                budgets=numbers.integers(BUDGETS.value, "budgets"),
                batch_size=BATCH_SIZE.value,
                max_new_tokens=MAX_NEW_TOKENS.value,
                dtype=DTYPE.value,
                mesh=MESH.value,
                num_samples=NUM_SAMPLES.value,
                seed=SEED.value,
                turns=cast(Turns, TURNS.value),
                tasks=tuple(TASKS.value),
                metrics=tuple(METRICS.value),
                parquet=PARQUET.value,
                compare=COMPARE.value,
                text_model=TEXT_MODEL.value,
                question=cast(WhichQuestion | None, QUESTION.value),
                enable_thinking=ENABLE_THINKING.value,
            )
            with executors.open_executor() as executor:
                evaluation = Evaluation(settings, str(WORKDIR.value), executor=executor)
                failed = evaluation.run()
    except Interrupted as stop:
        print(f"{stop}; rerun the same command to resume", file=sys.stderr)
        return
    if failed:
        print(summary(failed, len(evaluation.points), evaluation.workdir), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    show_flags()
    flags.mark_flags_as_required(["release", "data", "workdir"])
    app.run(main)

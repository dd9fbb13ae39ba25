"""Runs the points that have no row yet, and keeps the row of each as soon as it ends."""

import contextlib
from collections.abc import Iterable, Sequence

from vlm_jax.sweep.executor import Executor, Stopped, Task
from vlm_jax.sweep.failures import Failures
from vlm_jax.sweep.progress import PointsProgress
from vlm_jax.train.claim import Claim
from vlm_jax.train.workdir import write_lines
from vlm_jax.types import Fields

RESULTS_FILE = "results.jsonl"


def run_points(
    executor: Executor,
    tasks: Iterable[Task],
    todo: Sequence[str],
    rows: dict[str, Fields],
    failures: Failures,
    claim: Claim,
    progress: PointsProgress,
) -> None:
    """Runs tasks; only this process writes `results.jsonl` and `failed.jsonl`.

    Args:
      executor: where they are run.
      tasks: of the points, and of what they share.
      todo: labels of the points, in the order of their rows.
      rows: {label: row} of finished points; gets those of `todo`.
      failures: gets the points that failed or were stopped; the others go on.
      claim: of the workdir, held.
      progress: of the points.

    Raises:
      WorkdirInUse: another process took the workdir, where there are no locks; it has read all rows so far.
      Exception: that of a task which is no point, without which no point can be run.
    """
    order, points = [*rows, *todo], set(todo)
    with contextlib.closing(executor.run(tasks, progress.advance)) as every:
        for ended in every:
            if ended.label not in points:
                if ended.error is not None:
                    raise ended.error
                continue
            claim.confirm()
            if isinstance(ended.error, Stopped):
                failures.add_stopped(ended.label, str(ended.error))
            elif ended.error is not None:
                failures.add(ended.label, f"{type(ended.error).__name__}: {ended.error}")
            else:
                rows[ended.label] = ended.result
                write_lines(claim.workdir / RESULTS_FILE, [rows[label] for label in order if label in rows])
            progress.next_point()

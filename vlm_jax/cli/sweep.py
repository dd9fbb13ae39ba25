"""python -m vlm_jax.cli.sweep --config=configs/sweeps/X.py --workdir=DIR [--only=LABEL,LABEL]

Trains and evaluates every point of a sweep, and writes `results.jsonl`, `frontier.png` and `report.html`. Rerunning the
command resumes.
"""

import sys

from absl import flags

from vlm_jax.cli import command, executors
from vlm_jax.sweep.failures import STOPPED_FILE, summary
from vlm_jax.sweep.run import Sweep

ONLY = flags.DEFINE_list("only", [], "Labels of the points to run, as pool@16; all when empty.")


def main() -> None:
    """Sweeps candidates at token budgets; see `vlm_jax.sweep.run`. Exit status 1 where a point failed.

    Points that `config.sweep.halving` stops have not failed.
    """
    with executors.open_executor() as executor:
        sweep = Sweep(
            command.CONFIG.value,
            command.workdir(),
            config_path=command.config_path(),
            only=tuple(ONLY.value),
            overrides=command.overrides(),
            executor=executor,
        )
        sweep.run()
    if sweep.stopped:
        count = f"{len(sweep.stopped)} of {sweep.num_points} points were stopped by config.sweep.halving"
        print(f"{count}, as {sweep.workdir / STOPPED_FILE} says: {', '.join(sweep.stopped)}", file=sys.stderr)
    if sweep.failed:
        print(summary(sweep.failed, sweep.num_points, sweep.workdir), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)

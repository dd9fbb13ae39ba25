"""The results of the digits sweep as Markdown, written into the pages that show them.

    python experiments/digits_token_budget/table.py [WORKDIR]

With the workdir of a finished sweep its results and figure are copied here first. The tables and sentences between the
marks `<!-- results -->` and `<!-- end of results -->` of README.md, here and at the top, are then written anew from
`results.jsonl`.
"""

import argparse
import pathlib
import shutil
from collections.abc import Sequence

from etils import epath

from vlm_jax.sweep.findings import Enough, find
from vlm_jax.sweep.frontier import Accuracy, FrontierPoint, combine_seeds, tasks_of, told_seeds
from vlm_jax.sweep.pages import markdown, show
from vlm_jax.train.workdir import read_lines

HERE = pathlib.Path(__file__).resolve().parent
PAGES = {"overview": HERE.parent.parent / "README.md", "details": HERE / "README.md"}
CONTROLS = frozenset({"random", "downsample_image"})


def sections() -> dict[str, str]:
    """What each of PAGES shows of `results.jsonl`."""
    results = read_lines(epath.Path(HERE / "results.jsonl"))
    points, tasks = combine_seeds(results), tasks_of(results)
    found = sentences(points, tasks)
    return {
        "overview": f"\n{found}\n\n{by_budget(points, tasks[0])}\n",
        "details": f"\n{found}\n\n{every_task(points, tasks)}\n",
    }


def sentences(points: Sequence[FrontierPoint], tasks: Sequence[str]) -> str:
    """For every task the accuracy at full budget, and the fewest tokens that lose at most 5 points of it."""
    lines = [f"Means of {told_seeds(points)} with 95% intervals that hold the spread of the trainings."]
    for task in tasks:
        (finding,) = find(points, task, CONTROLS)
        enough: Enough = next(one for one in finding.enough if one.points_lost == 5)
        spread = sorted(set(enough.by_seed.values()))
        by_seed = "with every seed" if len(spread) == 1 else f"{spread[0]:g} to {spread[-1]:g} by seed"
        lines.append(
            f"*{task}*: `{enough.full.connector}` has {told(enough.full.accuracy[task])} with "
            f"{enough.full.costs['tokens']:g} tokens; the fewest that lose at most 5 points are "
            f"{enough.by_mean.costs['tokens']:g} (best by `{enough.by_mean.connector}`; {by_seed})."
        )
    return "\n".join(f"- {line}" if number else f"{line}\n" for number, line in enumerate(lines))


def by_budget(points: Sequence[FrontierPoint], task: str) -> str:
    """A task's accuracy, a row a budget and a column a candidate."""
    names = sorted(dict.fromkeys(point.connector for point in points), key=lambda name: (name in CONTROLS, name))
    budgets = sorted({point.runs[0]["token_budget"] for point in points})
    cells = {(point.runs[0]["token_budget"], point.connector): told(point.accuracy[task]) for point in points}
    heads = [f"control: `{name}`" if name in CONTROLS else f"`{name}`" for name in names]
    rows = [[str(budget), *(cells.get((budget, name), "") for name in names)] for budget in budgets]
    return markdown([f"tokens, *{task}*, %", *heads], rows)


def every_task(points: Sequence[FrontierPoint], tasks: Sequence[str]) -> str:
    """All accuracies and costs, a row a point."""
    rows = []
    for point in sorted(points, key=lambda point: (point.runs[0]["token_budget"], point.connector)):
        cells = [told(point.accuracy[task]) for task in tasks]
        rows.append(
            [f"`{point.connector}`", str(point.runs[0]["token_budget"]), *cells, f"{point.costs['flops'] / 1e6:.1f}"]
        )
    return markdown(["candidate", "tokens", *(f"{task}, %" for task in tasks), "MFLOPs"], rows)


def told(accuracy: Accuracy) -> str:
    """Mean and interval in percent."""
    return f"{100 * accuracy.mean:.1f} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", nargs="?", type=pathlib.Path, help="of a finished sweep")
    given = parser.parse_args().workdir
    if given is not None:
        for name in ("results.jsonl", "frontier.png"):
            shutil.copyfile(given / name, HERE / name)
    for name, text in sections().items():
        show(PAGES[name], text)


if __name__ == "__main__":
    main()

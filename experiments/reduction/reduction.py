"""Methods x budgets x systems of visual token reduction in one table and one figure; see README.md.

    python experiments/reduction/reduction.py --releases llava=FOLDER qwen2_5_vl=FOLDER --data=questions.jsonl \
        --methods visionzip fastv --budgets 192 64 --workdir=workdir/reduction

Each system is evaluated as by `vlm_jax.cli.evaluate`, in a folder of its own in the workdir, with that report.
Interrupt at any time; rerunning the command resumes. Without --releases, small folders of four systems are made.
"""

import argparse
import dataclasses
import io
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
from etils import epath
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from vlm_jax.cli.process import explained, keep_programs, quieten
from vlm_jax.paths import absolute
from vlm_jax.reducers import REDUCERS
from vlm_jax.sweep.evaluation import CONTROLS, Evaluation
from vlm_jax.sweep.frontier import styles
from vlm_jax.sweep.hard import DOWNSAMPLED, with_hard_questions
from vlm_jax.sweep.pages import markdown
from vlm_jax.sweep.point_run import ANSWERS_FILE
from vlm_jax.sweep.release_points import UNREDUCED, is_guided, label
from vlm_jax.sweep.release_run import ReleaseEvaluation
from vlm_jax.sweep.retained import Replicates, of_benchmarks, shares, task_scores, told
from vlm_jax.sweep.rows import RESULTS_FILE
from vlm_jax.train.workdir import each_line, read_lines

HERE = pathlib.Path(__file__).resolve().parent
LITERATURE = HERE / "literature.json"
DRAWN = ("random", DOWNSAMPLED)  # controls of every table and figure
STILL = tuple(
    kind for kind, cls in REDUCERS.items() if cls is not None and not cls.reduces_clips and kind not in CONTROLS
)
METHODS = tuple(kind for kind in STILL if not is_guided(kind))
BUDGETS = (192, 128, 64)
SMALL = {"methods": ("visionzip", "divprune", "fastv"), "budgets": (4, 2), "questions": 8}
WHOLE = label(UNREDUCED, None)
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates, writes `table.md`, `table.json` and `retained.png`; 1 where a point failed, else 0."""
    args = _arguments(argv)
    workdir, small = epath.Path(absolute(args.workdir)), not args.releases
    if small:
        from small import LONGEST, METRIC, SYSTEMS, TASK, write_system

        args.tasks, args.metrics, args.max_new_tokens = (TASK,), (f"{TASK}={METRIC}",), LONGEST
        places = {
            name: write_system(name, pathlib.Path(workdir) / "small", args.questions)
            for name in args.systems or SYSTEMS
        }
    else:
        places = {name: (release, args.data) for name, release in args.releases}
    evaluations = {}  # all made first: what a later release cannot do is known before hours of an earlier one
    for name, (release, data) in places.items():
        settings = ReleaseEvaluation(
            release=str(release),
            data=str(data),
            reducers=(UNREDUCED, *dict.fromkeys((*DRAWN, *args.methods))),
            budgets=tuple(args.budgets),
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            dtype=args.dtype,
            num_samples=args.num_samples,
            tasks=tuple(args.tasks),
            metrics=tuple(args.metrics),
            text_model=args.text_model,
        )
        console = rich.console.Console(markup=False)
        evaluations[name] = settings, Evaluation(settings, workdir / name, console=console)
    rows: list[Row] = []
    failed = False
    for name, (settings, evaluation) in evaluations.items():
        print(f"--- {name}: {settings.release}", flush=True)
        errors = {point: str(error) for point, error in evaluation.run().items()}
        failed |= bool(errors)
        missing = {one.label: one.reason for one in evaluation.refused if not one.label.startswith(f"{UNREDUCED}@")}
        rows += system_rows(name, workdir / name, settings, missing | errors)
    page = "\n".join([table(rows), *([] if small else ["", expected(rows)])])
    (workdir / "table.json").write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
    (workdir / "table.md").write_text(page + "\n")
    drawn = io.BytesIO()
    figure(rows).savefig(drawn, format="png")
    (workdir / "retained.png").write_bytes(drawn.getvalue())
    print(page)
    return int(failed)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--releases", nargs="+", type=_release, metavar="NAME=FOLDER", help="folders, or names on the hub"
    )
    parser.add_argument("--data", help="a file of conversations, as of vlm_jax.cli.evaluate; required with --releases")
    parser.add_argument("--workdir", required=True)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=sorted(REDUCERS),
        help="all for still pictures, or a few if small",
    )
    parser.add_argument("--budgets", nargs="+", type=int, help="visual tokens of an image, or of a tile")
    parser.add_argument("--tasks", nargs="+", help="as of vlm_jax.cli.evaluate; vqa if unset")
    parser.add_argument("--metrics", nargs="+", metavar="TASK=METRIC")
    parser.add_argument("--text_model", help="of methods that choose by the question, as of vlm_jax.cli.evaluate")
    parser.add_argument("--num_samples", type=int)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, help="32 if unset")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--systems", nargs="+", help="which of the small systems; all if unset")
    parser.add_argument("--questions", type=int, help=f"of each small system; {SMALL['questions']} if unset")
    args = parser.parse_args(argv)
    if bool(args.releases) != bool(args.data):
        parser.error("--releases and --data: expected both, or neither for small folders")
    of_others = ("systems", "questions") if args.releases else ("tasks", "metrics", "max_new_tokens")
    for name in of_others:
        if getattr(args, name) is not None:
            parser.error(f"--{name} is not read {'with' if args.releases else 'without'} --releases; leave it out")
    names = [name for name, _ in args.releases or ()]
    if len(set(names)) < len(names):
        parser.error(f"--releases: expected different names, got {' '.join(names)}")
    args.tasks, args.metrics = args.tasks or ("vqa",), args.metrics or ()
    args.max_new_tokens, args.questions = args.max_new_tokens or 32, args.questions or SMALL["questions"]
    of_releases = STILL if args.text_model else METHODS
    args.methods = args.methods or (of_releases if args.releases else SMALL["methods"])
    args.budgets = args.budgets or (BUDGETS if args.releases else SMALL["budgets"])
    return args


def _release(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, got '{text}'")
    return name, folder


def system_rows(name: str, workdir: epath.Path, settings: ReleaseEvaluation, missing: Mapping[str, str]) -> list[Row]:
    """One row a point of a system, from its evaluation's files.

    Args:
      name: of the system.
      workdir: of the evaluation.
      settings: likewise.
      missing: {label: reason} of the points that it cannot evaluate, or that failed.

    Returns:
      Rows of `table.json`: `retained` has the per cent of the unreduced release's scores, the mean over benchmarks,
      with its 95% interval; `benchmarks` those of each; `hard` the mean accuracy on the questions that the control
      `downsample_image` gets wrong; `prefill` the share of the release's FLOPs. Missing points have a `reason` only.
    """

    def answers(point: str) -> Iterable[Row]:
        return each_line(workdir / "points" / point / ANSWERS_FILE)

    results = {
        line["label"]: line for line in with_hard_questions(read_lines(workdir / RESULTS_FILE), DOWNSAMPLED, answers)
    }
    absent = [{"system": name, "label": point, "reason": reason} for point, reason in missing.items()]
    if WHOLE not in results:
        return absent
    scores = {point: replicates(answers(point), settings.chosen_metrics) for point in results}
    rows: list[Row] = []
    for point, line in results.items():
        hard = [of_task["mean"] for of_task in line["hard_accuracy"].values()]
        rows.append(
            {
                "system": name,
                "label": point,
                "method": line["connector"],
                "budget": line["token_budget"],
                "tokens": line["num_visual_tokens"],
                **retained(scores[point], scores[WHOLE]),
                "hard": sum(hard) / len(hard) if hard else None,
                "prefill": line["flops"]["prefill"] / results[WHOLE]["flops"]["prefill"],
            }
        )
    return rows + absent


def replicates(rows: Iterable[Row], chosen: Mapping[str, str]) -> dict[str, Replicates]:
    """{benchmark: its score, and that of each bootstrap replicate}, as the report has them."""
    return of_benchmarks(task_scores(rows, chosen), chosen)


def retained(ours: Mapping[str, Replicates], whole: Mapping[str, Replicates]) -> Row:
    """Per cent of the unreduced scores: `retained` with the mean over benchmarks and its interval, and `benchmarks`.

    A benchmark on which the unreduced release scores 0 is left out; without any other, `retained` is None.
    """
    found = shares(ours, whole)
    if not found:
        return {"retained": None, "benchmarks": {}}
    mean = np.mean([*found.values()], axis=0)
    return {"retained": _told(mean), "benchmarks": {name: _told(share) for name, share in found.items()}}


def _told(values: Replicates) -> Row:
    return dataclasses.asdict(told(values))


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown: a row a point, and what could not be evaluated below it."""
    cells = []
    for row in rows:
        if "reason" in row:
            continue
        name = f"`{row['method']}`" + (" (control)" if row["method"] in CONTROLS else "")
        budget = "all" if row["budget"] is None else f"{row['budget']}"
        hard = "" if row["hard"] is None else f"{100 * row['hard']:.0f}"
        cells.append(
            [row["system"], name, budget, f"{row['tokens']:g}", _share(row), hard, f"{100 * row['prefill']:.0f}"]
        )
    head = ["system", "method", "budget", "tokens", "% retained", "hard, %", "prefill FLOPs, %"]
    missing = [f"- {row['system']}, {row['label']}: {row['reason']}" for row in rows if "reason" in row]
    return "\n".join([markdown(head, cells), *(["", "Not evaluated:", "", *missing] if missing else [])])


def _share(row: Row) -> str:
    share = row["retained"]
    if share is None:
        return ""
    ends = "–" if share["low"] is None else f"{share['low']:.1f}, {share['high']:.1f}"
    return f"{share['mean']:.1f} [{ends}]"


def expected(rows: Sequence[Row]) -> str:
    """The tables of `literature.json`, with what was measured here beside."""
    literature = json.loads(LITERATURE.read_text())
    here = {(row["system"], row["method"], row["budget"]): _share(row) for row in rows if "reason" not in row}
    parts = [f"Per cent retained. {literature['source']}."]
    for name in ("llava", "llava_next"):
        of_system = literature[name]
        cells = [
            [
                f"{point['budget']}",
                f"`{point['method']}`",
                *map(_score, point["scores"]),
                f"{point['average']:.1f}",
                here.get((name, point["method"], point["budget"]), ""),
            ]
            for point in of_system["points"]
        ]
        whole = ["all", "", *map(_score, of_system["full"]), "100.0", ""]
        head = ["tokens", "method", *of_system["benchmarks"], "% retained", "*here*"]
        parts += [f"`{name}`: {of_system['release']}.", markdown(head, [whole, *cells])]
    return "\n\n".join(parts)


def _score(score: float) -> str:
    return f"{score:.1f}" if score < 1000 else f"{score}"  # MME is a sum


def figure(rows: Sequence[Row]) -> Figure:
    """Per cent retained against the budget, a panel for each system; controls are grey and dashed."""
    drawn = [row for row in rows if row.get("retained") is not None and row["budget"] is not None]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    looks = styles([row["method"] for row in drawn if row["method"] != UNREDUCED], CONTROLS)
    columns = min(2, len(systems))
    lines = -(-len(systems) // columns)
    made = Figure(figsize=(5 * columns, 1.4 + 2.9 * lines), dpi=160, layout="constrained")
    panels = made.subplots(lines, columns, squeeze=False, sharey=True).flat
    budgets, step = sorted({row["budget"] for row in drawn}), min(0.08, 0.3 / max(1, len(looks) - 1))
    for system, panel in zip(systems, panels, strict=False):
        for place, (method, look) in enumerate(looks.items()):
            points = sorted(
                (r for r in drawn if (r["system"], r["method"]) == (system, method)), key=lambda r: r["budget"]
            )
            if not points:
                continue
            shares = [point["retained"] for point in points]
            # Side by side, so that intervals at one budget can be told apart.
            across = [point["budget"] * 2 ** (step * (place - (len(looks) - 1) / 2)) for point in points]
            known = [s if s["low"] is not None else dict.fromkeys(("mean", "low", "high"), 0) for s in shares]
            ends = [[max(0, s["mean"] - s["low"]) for s in known], [max(0, s["high"] - s["mean"]) for s in known]]
            line = "--" if look.dashed else "-"
            shown = {"color": look.color, "marker": look.marker, "linestyle": line, "markersize": 4, "linewidth": 1}
            panel.errorbar(across, [s["mean"] for s in shares], yerr=ends, capsize=2, elinewidth=0.8, **shown)
        panel.axhline(100, color="0.6", linewidth=0.8, zorder=0)
        panel.set_xscale("log", base=2)
        if budgets:
            panel.set_xlim(budgets[0] / 1.5, budgets[-1] * 1.5)
        panel.xaxis.set_major_locator(FixedLocator(budgets))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_title(system, loc="left", fontsize=10, parse_math=False)
        panel.grid(color="0.9", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(made.axes)[len(systems) :]:
        panel.remove()
    made.supxlabel("visual tokens of an image, or of a tile", fontsize=10)
    made.supylabel("% retained, with 95% intervals", fontsize=10)
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, linestyle="--" if look.dashed else "-")
        for look in looks.values()
    ]
    names = [f"{name} (control)" if look.dashed else name for name, look in looks.items()]
    made.legend(handles, names, loc="outside upper center", ncols=4, frameon=False)
    return made


if __name__ == "__main__":
    keep_programs()
    quieten()
    with explained(OSError):
        status = main()
    sys.exit(status)

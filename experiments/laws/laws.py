"""The law of error by decoder size and visual tokens, fitted to the sweeps of `configs/sweeps/laws.py`; see README.md.

    python experiments/laws/laws.py workdir/laws [--text_tokens=8] [--flops 1e7 1e8] [--output=FOLDER]

Reads `results.jsonl` of every folder `PAGES_WIDTH` in the workdir. For each task it prints the exponents with their
ranges over seeds, how well the law predicts points that it was not fitted to, and the best tokens and decoder within
FLOPs of inference; writes `laws.json` and `laws.png`. Folders without all budgets and seeds, and what cannot be fitted,
are named.
"""

import argparse
import dataclasses
import io
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from vlm_jax.sweep.frontier import COLORS, FrontierPoint, combine_seeds, replace_whole
from vlm_jax.sweep.laws import (
    HeldOut,
    Law,
    Measured,
    best_within,
    exponent_intervals,
    fit,
    flops_of,
    hold_out,
    residual,
    splits,
)
from vlm_jax.sweep.pages import markdown
from vlm_jax.sweep.rows import RESULTS_FILE
from vlm_jax.train.workdir import read_lines

ALL, NESTED = "mean of tasks", "matryoshka"


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The law of one task.

    Attributes:
      pages, task: of which it is.
      points: all that are measured.
      law: of all points.
      rms: root mean square of what it predicts of them, minus what they have.
      intervals: ranges of its exponents over seeds, as of `exponent_intervals`.
      held_out: {what: how well the law of the rest predicts it}; what the rest is too few for is omitted.
    """

    pages: str
    task: str
    points: tuple[Measured, ...]
    law: Law
    rms: float
    intervals: dict[str, tuple[float, float]] | None
    held_out: dict[str, HeldOut]

    @property
    def sizes(self) -> list[float]:
        """Parameters of the decoders, ascending."""
        return sorted({point.size for point in self.points})

    @property
    def tokens(self) -> list[float]:
        """Numbers of visual tokens, ascending."""
        return sorted({point.tokens for point in self.points})


def measured(workdir: epath.Path) -> dict[tuple[str, str], list[Measured]]:
    """{(pages, task): points} of a workdir; errors are means over seeds, and those of each.

    Points are those of the connector that nests its budgets, sizes the parameters of the decoder. The mean of all tasks
    is a task of its own.

    Raises:
      ValueError: no folder has results.
    """
    found: dict[tuple[str, str], list[Measured]] = {}
    for folder in sorted(workdir.iterdir()):
        if not (folder / RESULTS_FILE).exists():
            continue
        pages = folder.name.partition("_")[0]
        for point in _nested(folder):
            size, tokens = point.runs[0]["num_params"]["decoder"], point.costs["tokens"]
            errors = {
                task: {seed: float(1 - share) for seed, share in accuracy.seeds.items()}
                for task, accuracy in point.accuracy.items()
            }
            common = set.intersection(*map(set, errors.values()))
            errors[ALL] = {seed: _mean([of_task[seed] for of_task in errors.values()]) for seed in sorted(common)}
            for task, seeds in errors.items():
                if seeds:
                    one = Measured(float(size), float(tokens), _mean(seeds.values()), seeds)
                    found.setdefault((pages, task), []).append(one)
    if not found:
        raise ValueError(f"{workdir}: expected folders such as digits_16 with {RESULTS_FILE}; run the sweeps first")
    return found


def _nested(folder: epath.Path) -> list[FrontierPoint]:
    return [point for point in combine_seeds(read_lines(folder / RESULTS_FILE)) if point.connector == NESTED]


def _mean(errors: Collection[float]) -> float:
    return sum(errors) / len(errors)


def incomplete(workdir: epath.Path) -> list[str]:
    """A line for each folder that lacks budgets, or seeds of them, that another one of the same pages has."""
    found: dict[str, dict[str, set[tuple[int, int]]]] = {}
    for folder in sorted(workdir.iterdir()):
        if (folder / RESULTS_FILE).exists():
            runs = [run for point in _nested(folder) for run in point.runs]
            pairs = {(run["token_budget"], run["seed"]) for run in runs}
            found.setdefault(folder.name.partition("_")[0], {})[folder.name] = pairs
    lines = []
    for folders in found.values():
        whole = set.union(*folders.values())
        for name, pairs in folders.items():
            if pairs != whole:
                lacking = ", ".join(f"{tokens} tokens (seed {seed})" for tokens, seed in sorted(whole - pairs))
                lines.append(f"{name}: not finished: lacks {lacking}; the law is fitted to its other points")
    return lines


def fitted(pages: str, task: str, points: Sequence[Measured], left_out: list[str]) -> Fitted | None:
    """The law of a task's points, and of those that are left where some are held out.

    Args:
      pages, task: of which it is.
      points: that are measured.
      left_out: gets a line for what the points are too few for: a split, or the law itself, which is then None.
    """
    try:
        law = fit(points)
    except ValueError as error:
        left_out.append(f"{pages}, {task}: left out: {error}")
        return None
    held: dict[str, HeldOut] = {}
    for name, out in splits(points).items():
        try:
            held[name] = hold_out(points, out)
        except ValueError as error:
            left_out.append(f"{pages}, {task}, {name} held out: left out: {error}")
    return Fitted(pages, task, tuple(points), law, residual(law, points), exponent_intervals(points), held)


def table(laws: Sequence[Fitted]) -> str:
    """Exponents with their ranges over seeds, and errors in percentage points, in Markdown.

    `mean` is the error of the mean of the other points.
    """
    names = list(dict.fromkeys(name for one in laws for name in one.held_out))
    head = ["pages", "task", "alpha (size)", "beta (tokens)", "floor, %", "rms, points"]
    head += [f"{name} held out: rms (mean)" for name in names]
    rows = []
    for one in laws:
        law, exponents = one.law, []
        for name, exponent in (("alpha", one.law.alpha), ("beta", one.law.beta)):
            ends = "–" if one.intervals is None else ", ".join(f"{end:.3f}" for end in one.intervals[name])
            exponents.append(f"{exponent:.3f} [{ends}]")
        held = [one.held_out.get(name) for name in names]
        errors = ["–" if h is None else f"{100 * h.rms:.1f} ({100 * h.rms_of_mean:.1f})" for h in held]
        rows.append([one.pages, one.task, *exponents, f"{100 * law.floor:.1f}", f"{100 * one.rms:.1f}", *errors])
    return markdown(head, rows)


def advice(laws: Sequence[Fitted], text_tokens: float, flops: Sequence[float]) -> list[dict[str, Any]]:
    """The best tokens of every task within FLOPs of inference, and the decoder that is affordable with them.

    Without given FLOPs, those of the smallest decoder with all tokens, and of each larger one.
    """
    found = []
    for one in laws:
        most = max(one.tokens)
        best = one.law.optimal_tokens(text_tokens, min(one.tokens), most)
        for budget in flops or [flops_of(size, text_tokens, most) for size in one.sizes]:
            there = best_within(one.law, budget, text_tokens, one.points)
            found.append(
                {
                    "pages": one.pages,
                    "task": one.task,
                    "flops": budget,
                    "tokens": best,
                    "size": budget / flops_of(1.0, text_tokens, best),
                    "best_by_law": None if there is None else dataclasses.asdict(there),
                    "error_by_law": None if there is None else float(one.law.error(there.size, there.tokens)),
                }
            )
    return found


def advice_table(found: Sequence[Mapping[str, Any]]) -> str:
    """The same in Markdown."""
    head = ["pages", "task", "FLOPs", "best tokens", "parameters"]
    head += ["best by the law among those measured: tokens, parameters", "error by the law, %", "measured error, %"]
    rows = []
    for one in found:
        there = one["best_by_law"]
        told = ["none fits", "", ""]
        if there is not None:
            errors = one["error_by_law"], there["error"]
            told = [f"{there['tokens']:g}, {there['size']:,.0f}", *(f"{100 * error:.1f}" for error in errors)]
        cells = [f"{one['flops']:.2g}", f"{one['tokens']:.1f}", f"{one['size']:,.0f}"]
        rows.append([one["pages"], one["task"], *cells, *told])
    return markdown(head, rows)


def figure(laws: Sequence[Fitted]) -> Figure:
    """Error against tokens, a panel for each task and a curve for each decoder.

    Lines are the law of all points; dashed ones that of the smaller decoders, where the largest is held out.
    """
    columns = min(3, len(laws))
    lines = -(-len(laws) // columns)
    made = Figure(figsize=(4.2 * columns, 0.6 + 3 * lines), dpi=160, layout="constrained")
    panels = list(made.subplots(lines, columns, squeeze=False).flat)
    for panel, one in zip(panels, laws, strict=False):
        dense = np.geomspace(min(one.tokens), max(one.tokens), 60)
        for color, size in zip(COLORS, one.sizes, strict=False):
            own = sorted((p for p in one.points if p.size == size), key=lambda point: point.tokens)
            shown, errors = [point.tokens for point in own], [point.error for point in own]
            panel.plot(shown, errors, "o", color=color, label=f"{size / 1e3:,.0f} k", markersize=4)
            panel.plot(dense, one.law.error(size, dense), color=color, linewidth=1)
            if size == max(one.sizes) and "largest model" in one.held_out:
                without = one.held_out["largest model"].law
                panel.plot(dense, without.error(size, dense), "--", color=color, linewidth=1, gid="held out")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_locator(FixedLocator(one.tokens))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_title(f"{one.pages}, {one.task}", loc="left", fontsize=10, parse_math=False)
        panel.grid(color="0.9", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(laws) :]:
        panel.remove()
    made.axes[0].legend(title="decoder parameters", fontsize=7, title_fontsize=7, frameon=False)
    made.supxlabel("visual tokens", fontsize=10)
    made.supylabel("error", fontsize=10)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Fits, prints, writes `laws.json` and `laws.png`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=epath.Path)
    parser.add_argument("--text_tokens", type=float, default=8, help="of a prompt, beside the visual ones; 0 if cached")
    parser.add_argument("--flops", type=float, nargs="+", default=(), help="of a prompt in the decoder; several")
    parser.add_argument("--output", type=epath.Path, help="folder of the files; the workdir if unset")
    args = parser.parse_args(argv)
    told = incomplete(args.workdir)
    tried = [fitted(pages, task, points, told) for (pages, task), points in measured(args.workdir).items()]
    laws = [one for one in tried if one is not None]
    if not laws:
        raise ValueError("\n".join([f"{args.workdir}: no law can be fitted", *told]))
    advised = advice(laws, args.text_tokens, args.flops)
    output = epath.Path(args.output or args.workdir)
    written = {"text_tokens": args.text_tokens, "laws": [dataclasses.asdict(one) for one in laws], "advice": advised}
    replace_whole(output / "laws.json", (json.dumps(written, indent=1, allow_nan=False) + "\n").encode())
    drawn = io.BytesIO()
    figure(laws).savefig(drawn, format="png")
    replace_whole(output / "laws.png", drawn.getvalue())
    print("\n".join([table(laws), "", advice_table(advised), *([""] if told else []), *told]))


if __name__ == "__main__":
    main()

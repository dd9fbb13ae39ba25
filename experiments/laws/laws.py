"""The law of error by decoder size and visual tokens, fitted to the sweeps of `configs/sweeps/laws.py`; see README.md.

    python experiments/laws/laws.py workdir/laws [--text_tokens=8] [--flops 1e7 1e8] [--output=FOLDER]

Reads `results.jsonl` of every folder `PAGES_WIDTH` in the workdir. For each task it prints the exponents with their
intervals, what the law says of points that it was not fitted to, and the best tokens and decoder within FLOPs of
inference; writes `laws.json` and `laws.png`.
"""

import argparse
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from vlm_jax.sweep.frontier import COLORS, combine_seeds, replace_whole
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
      rms: root mean square of what it says of them, minus what they have.
      intervals: of its exponents.
      held_out: {what: how well it is said by the law of the rest}.
    """

    pages: str
    task: str
    points: tuple[Measured, ...]
    law: Law
    rms: float
    intervals: dict[str, tuple[float, float]]
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
    """{(pages, task): points} of a workdir; errors are means over seeds.

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
        for point in combine_seeds(read_lines(folder / RESULTS_FILE)):
            if point.connector != NESTED:
                continue
            size, tokens = point.runs[0]["num_params"]["decoder"], point.costs["tokens"]
            errors = {task: 1 - accuracy.mean for task, accuracy in point.accuracy.items()}
            errors[ALL] = sum(errors.values()) / len(errors)
            for task, error in errors.items():
                found.setdefault((pages, task), []).append(Measured(float(size), float(tokens), float(error)))
    if not found:
        raise ValueError(f"{workdir}: expected folders such as digits_16 with {RESULTS_FILE}; run the sweeps first")
    return found


def fitted(pages: str, task: str, points: Sequence[Measured]) -> Fitted:
    """The law of a task's points, and of those that are left where some are held out."""
    law = fit(points)
    held = {name: hold_out(points, out) for name, out in splits(points).items()}
    return Fitted(pages, task, tuple(points), law, residual(law, points), exponent_intervals(points), held)


def table(laws: Sequence[Fitted]) -> str:
    """Exponents and errors, in percentage points, in Markdown; `mean` is the error of the mean of the other points."""
    names = list(laws[0].held_out)
    head = ["pages", "task", "alpha (size)", "beta (tokens)", "floor, %", "rms, points"]
    head += [f"{name} held out: rms (mean)" for name in names]
    rows = []
    for one in laws:
        ends = {name: f" [{low:.3f}, {high:.3f}]" for name, (low, high) in one.intervals.items()}
        law = one.law
        exponents = [f"{law.alpha:.3f}{ends['alpha']}", f"{law.beta:.3f}{ends['beta']}"]
        errors = [f"{100 * one.held_out[name].rms:.1f} ({100 * one.held_out[name].rms_of_mean:.1f})" for name in names]
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
            there = best_within(one.law, budget, text_tokens, one.sizes, one.tokens)
            found.append(
                {
                    "pages": one.pages,
                    "task": one.task,
                    "flops": budget,
                    "tokens": best,
                    "size": budget / flops_of(1.0, text_tokens, best),
                    "of_measured": None if there is None else dataclasses.asdict(there),
                }
            )
    return found


def advice_table(found: Sequence[Mapping[str, Any]]) -> str:
    """The same in Markdown."""
    head = ["pages", "task", "FLOPs", "best tokens", "parameters", "of those measured: tokens, parameters", "error, %"]
    rows = []
    for one in found:
        there = one["of_measured"]
        told = ["none fits", ""]
        if there is not None:
            told = [f"{there['tokens']:g}, {there['size']:,.0f}", f"{100 * there['error']:.1f}"]
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
            if size == max(one.sizes):
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
    laws = [fitted(pages, task, points) for (pages, task), points in measured(args.workdir).items()]
    advised = advice(laws, args.text_tokens, args.flops)
    output = epath.Path(args.output or args.workdir)
    written = {"text_tokens": args.text_tokens, "laws": [dataclasses.asdict(one) for one in laws], "advice": advised}
    replace_whole(output / "laws.json", (json.dumps(written, indent=1) + "\n").encode())
    drawn = io.BytesIO()
    figure(laws).savefig(drawn, format="png")
    replace_whole(output / "laws.png", drawn.getvalue())
    print(f"{table(laws)}\n\n{advice_table(advised)}")


if __name__ == "__main__":
    main()

"""Character precision against characters per visual token, from the results of a sweep of pages of text.

    python experiments/document_reading/figure.py WORKDIR/results.jsonl [--task=ocr] [--curves=size] [--output=PNG]

Prints the table of the points as Markdown, and draws one panel per text size with a curve per connector, or with
`--curves=size` one panel per connector with a curve per text size: if only the characters per token count, the curves
of a panel agree.
"""

import argparse
import dataclasses
import functools
import pathlib
import random
import shutil
from collections.abc import Sequence
from typing import Any, Literal

from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, PercentFormatter

from vlm_jax.data.glyphs import CHARACTERS
from vlm_jax.evals.metrics.text import character_precision
from vlm_jax.sweep.frontier import Accuracy, Style, combine_seeds, styles, tasks_of, told_seeds
from vlm_jax.sweep.pages import markdown, show
from vlm_jax.train.workdir import read_lines

HERE = pathlib.Path(__file__).resolve().parent
SHOWN = "ocr_line"  # what README.md shows
CONTROLS = ("random", "downsample_image")
GUESSES = 50  # pairs of random texts


@dataclasses.dataclass(frozen=True)
class Reading:
    """One connector at one budget on pages of one text size.

    Attributes:
      connector: its label in the sweep.
      tokens: visual tokens of a page; the mean over seeds.
      size: lines, and characters of a line.
      precision: mean over seeds, and its interval.
      length: characters of an answer: those of a line, or of the page.
    """

    connector: str
    tokens: float
    size: tuple[int, int]
    precision: Accuracy
    length: int

    @property
    def characters(self) -> int:
        """Characters of a page."""
        return self.size[0] * self.size[1]

    @property
    def per_token(self) -> float:
        """Characters of the page per visual token, also where one line of it is asked for."""
        return self.characters / self.tokens

    @property
    def title(self) -> str:
        """The text size in words."""
        return f"{self.characters} characters ({self.size[0]}x{self.size[1]})"


def readings(results: Sequence[dict[str, Any]], task: str = SHOWN) -> list[Reading]:
    """The points of a sweep on one task, of all text sizes, by size and then in the sweep's order.

    Args:
      results: lines of `results.jsonl`.
      task: what of a page is read, as `ocr` in `ocr:8x16`.

    Raises:
      ValueError: the sweep has no such task.
    """
    points, found = combine_seeds(results), []
    for name in tasks_of(results):
        kind, _, size = name.partition(":")
        if kind != task or not size:
            continue
        rows, cols = map(int, size.split("x"))
        lengths = {"ocr": rows, "ocr_line": 1}  # lines
        found += [
            Reading(point.connector, point.costs["tokens"], (rows, cols), point.accuracy[name], lengths[task] * cols)
            for point in points
            if name in point.accuracy
        ]
    if not found:
        raise ValueError(f"no task '{task}:ROWSxCOLS' in the results; they have {', '.join(tasks_of(results))}")
    return sorted(found, key=lambda reading: reading.characters)


@functools.cache
def guessed_precision(length: int) -> float:
    """Mean precision of a random text of the right length: what is reached without seeing the page."""
    rng = random.Random(0)
    texts = [["".join(rng.choices(CHARACTERS, k=length)) for _ in range(GUESSES)] for _ in range(2)]
    return sum(map(character_precision, *texts)) / GUESSES


def table(found: Sequence[Reading]) -> str:
    """Markdown, one row for each reading; precisions in percent with their intervals."""
    rows = []
    for reading in sorted(found, key=lambda r: (r.characters, r.tokens)):
        share = reading.precision
        interval = f"{100 * share.mean:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"
        cells = [f"{reading.characters}", f"`{reading.connector}`", f"{reading.tokens:g}", f"{reading.per_token:g}"]
        rows.append([*cells, interval])
    for size, length in dict.fromkeys((reading.characters, reading.length) for reading in found):
        rows.append([f"{size}", "guessing", "", "", f"{100 * guessed_precision(length):.1f}"])
    return markdown(["characters", "connector", "visual tokens", "characters per token", "precision, %"], rows)


def draw(found: Sequence[Reading], seeds: str, curves: str = "connector") -> Figure:
    """The figure; dashed lines are guesses, bars are 95% intervals.

    Args:
      found: of `readings`.
      seeds: how many, in words.
      curves: "connector" or "size": what has one curve; the other has one panel.
    """
    by_panel = {"connector": lambda r: r.title, "size": lambda r: r.connector}[curves]
    by_curve = {"connector": lambda r: r.connector, "size": lambda r: r.title}[curves]
    panels = list(dict.fromkeys(map(by_panel, found)))
    looks = styles(list(dict.fromkeys(map(by_curve, found))), frozenset(CONTROLS))
    figure = Figure(figsize=(1.2 + 3.4 * len(panels), 3.9), dpi=160, layout="constrained")
    for panel, name in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        shown = [reading for reading in found if by_panel(reading) == name]
        for curve, look in looks.items():
            own = sorted((r for r in shown if by_curve(r) == curve), key=lambda r: r.per_token)
            if own:
                _draw_curve(panel, own, look)
        for length in {reading.length for reading in shown}:
            panel.axhline(guessed_precision(length), color="0.6", linestyle=":", linewidth=1, gid="guess")
        panel.set_title(f"{name} ({seeds})", loc="left", fontsize=9)
        _format(panel, sorted({reading.per_token for reading in shown}))
    figure.axes[0].set_ylabel("character precision")
    figure.supxlabel("characters per visual token", fontsize=10)
    handles = [Line2D([], [], color=look.color, marker=look.marker, linestyle=_line(look)) for look in looks.values()]
    labels = [f"{name} (control)" if name in CONTROLS else name for name in looks]
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _line(look: Style) -> Literal["-", "--"]:
    return "--" if look.dashed else "-"


def _draw_curve(panel: Axes, own: Sequence[Reading], look: Style) -> None:
    shares = [reading.precision for reading in own]
    panel.errorbar(
        [reading.per_token for reading in own],
        [share.mean for share in shares],
        # Rounding may put a mean of 1 slightly above its interval.
        yerr=[[max(0.0, s.mean - s.low) for s in shares], [max(0.0, s.high - s.mean) for s in shares]],
        color=look.color,
        marker=look.marker,
        linestyle=_line(look),
        markersize=5,
        linewidth=1.2,
        elinewidth=0.9,
        capsize=2,
    )


def _format(panel: Axes, ratios: Sequence[float]) -> None:
    panel.set_xscale("log", base=2)
    panel.minorticks_off()
    panel.xaxis.set_major_locator(FixedLocator(list(ratios)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:.3g}"))
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panel.set_ylim(-0.02, 1.02)
    panel.grid(color="0.9", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def section() -> str:
    """What README.md shows of `results.jsonl`."""
    results = read_lines(epath.Path(HERE / "results.jsonl"))
    seeds = told_seeds(combine_seeds(results))
    return f"\n{table(readings(results, SHOWN))}\n\nMeans of {seeds} with 95% intervals.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", nargs="?", type=pathlib.Path, help="of a finished sweep")
    parser.add_argument("--task", default=SHOWN, choices=("ocr", "ocr_line"))
    parser.add_argument("--curves", default="connector", choices=("connector", "size"))
    parser.add_argument("--output", type=pathlib.Path)
    given = parser.parse_args()
    source = HERE if given.workdir is None else given.workdir
    results = read_lines(epath.Path(source / "results.jsonl"))
    found = readings(results, given.task)
    print(table(found))
    figure = draw(found, told_seeds(combine_seeds(results)), given.curves)
    figure.savefig(given.output or HERE / "precision.png")
    if given.output is None:
        if given.workdir is not None:
            shutil.copyfile(given.workdir / "results.jsonl", HERE / "results.jsonl")
        show(HERE / "README.md", section())


if __name__ == "__main__":
    main()

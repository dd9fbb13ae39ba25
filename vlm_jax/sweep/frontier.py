"""The Pareto front of accuracy against cost, and its figure."""

import dataclasses
import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter

from vlm_jax.evals.intervals import Trainings, intervals_over_seeds

Number = float | int

# Okabe and Ito's colour-blind-safe palette without its yellow, which is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CONTROL_COLORS = ("#6E6E6E", "#9A9A9A")
FRONT_COLOR = "#FFDF80"  # a pale band behind the points
# A marker of matplotlib and its name in plotly. Seven, so that marker and colour do not repeat together.
MARKERS = (
    ("o", "circle"),
    ("s", "square"),
    ("^", "triangle-up"),
    ("D", "diamond"),
    ("v", "triangle-down"),
    ("P", "cross"),
    ("X", "x"),
)
# On the token axis, connectors with the same budget are drawn next to each other: spacing in octaves, and total.
DODGE_OCTAVES, WIDEST_DODGE = 0.08, 0.4
LOG_FROM_RATIO = 8.0  # costs with a smaller ratio are drawn on a linear axis
REQUIRED = frozenset(
    {"connector", "token_budget", "num_visual_tokens", "realised_visual_tokens", "accuracy", "num_params", "flops"}
    | {"step_seconds", "peak_bytes", "seed", "command"}
)


@dataclasses.dataclass(frozen=True)
class Axis:
    """A cost: its title, and the number of base units in one displayed unit."""

    title: str
    divisor: float
    unit: str


AXES = {
    "tokens": Axis("Visual tokens per image", 1.0, ""),
    "flops": Axis("Forward FLOPs per example: encoder + connector + prefill", 1e9, "G"),
    "parameters": Axis("Parameters: encoder + connector + decoder", 1e6, "M"),
    "step_seconds": Axis("Time of a training step", 1e-3, "ms"),
    "prefill_seconds": Axis("Time of a prefill, per example", 1e-3, "ms"),
    "decode_seconds": Axis("Time of a new token, per example", 1e-3, "ms"),
    "seconds_per_sample": Axis("Time of an answer", 1e-3, "ms"),
    "chip_seconds": Axis("Predicted chip time of an example, an estimate", 1e-3, "ms"),
}


# Costs that a result may lack.
MEASURED = ("prefill_seconds", "decode_seconds", "seconds_per_sample", "chip_seconds")


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A share of what is correct of answers, in [0, 1]: its mean over seeds and the 95% interval of that.

    Attributes:
      mean, low, high: shares; the interval is that of `evals.intervals.intervals_over_seeds`.
      n: questions of each seed.
      seeds: {seed: its share}.
    """

    mean: Number
    low: Number
    high: Number
    n: int
    seeds: dict[int, Number]


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
    """One connector at one budget, averaged over its seeds.

    Attributes:
      label: `connector@budget`.
      costs: by key of AXES, in base units; the mean over seeds. A time that no seed measured is
        omitted.
      accuracy: by task.
      hard: by task, of the questions that the downsampled picture gets wrong at the same budget; see `sweep.hard`.
      runs: the results of the point.
    """

    label: str
    connector: str
    costs: dict[str, Number]
    accuracy: dict[str, Accuracy]
    hard: dict[str, Accuracy]
    runs: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Style:
    """The style of a connector in matplotlib and in plotly."""

    color: str
    marker: str
    symbol: str
    dashed: bool


def pareto_front(points: Sequence[tuple[Number, Number]]) -> list[int]:
    """The points that are not dominated, by cost.

    Args:
      points: (cost, value); lower costs and higher values are better.

    Returns:
      Indices, by ascending cost. A point is dominated when another has no higher cost and no lower value,
      and is better in one of the two. So of equal costs only the highest value is kept, of equal values
      only the lowest cost, and points that are equal in both are all kept, in the order given.

    Raises:
      ValueError: a cost or value that is not finite.
    """
    for index, point in enumerate(points):
        if not all(map(math.isfinite, point)):
            raise ValueError(f"expected finite costs and values, point {index} is {point}")
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def total_costs(result: dict[str, Any]) -> dict[str, Number]:
    """The costs of one result, by key of AXES, in base units; an unmeasured time is left out.

    Tokens are those that enter the decoder, or where it drops some, the mean over its layers.
    """
    tokens = result["realised_visual_tokens"]["mean"]
    if result.get("mean_visual_tokens", 0) > result["num_visual_tokens"]:  # dropped inside the decoder
        tokens = result["mean_visual_tokens"]
    costs = {
        "tokens": tokens,
        "flops": sum(result["flops"].values()),
        "parameters": sum(result["num_params"].values()),
        "step_seconds": result["step_seconds"],
        **{key: result.get(key) for key in MEASURED},
    }
    return {key: cost for key, cost in costs.items() if cost is not None}


def combine_seeds(results: Sequence[dict[str, Any]]) -> list[FrontierPoint]:
    """Combines results to points, in order of first appearance.

    Raises:
      ValueError: no results, one without a required key, none with an accuracy.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for index, result in enumerate(results):
        if missing := sorted(REQUIRED - result.keys()):
            raise ValueError(f"result {index} lacks {', '.join(missing)}; it has {', '.join(sorted(result))}")
        groups.setdefault(f"{result['connector']}@{result['token_budget']}", []).append(result)
    if not any(result["accuracy"] for result in results):
        raise ValueError(f"nothing to report: {len(results)} results, none with an accuracy; run the sweep")
    return [
        _combine(label, runs, accuracy, hard)
        for (label, runs), accuracy, hard in zip(
            groups.items(), _by_task(groups, "accuracy"), _by_task(groups, "hard_accuracy"), strict=True
        )
    ]


def _by_task(groups: dict[str, list[dict[str, Any]]], key: str) -> list[dict[str, Accuracy]]:
    """The accuracy of every point by task, from the entries under a key."""
    made: dict[str, dict[str, Accuracy]] = {label: {} for label in groups}
    for task in dict.fromkeys(task for runs in groups.values() for run in runs for task in run.get(key, {})):
        having = {
            label: {run["seed"]: run[key][task] for run in runs if task in run.get(key, {})}
            for label, runs in groups.items()
        }
        for label, accuracy in _accuracies({label: shares for label, shares in having.items() if shares}).items():
            made[label][task] = accuracy
    return list(made.values())


def _accuracies(points: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Accuracy]:
    """{label: accuracy} on one task, from {label: {seed: entry}}."""
    shares = {label: {seed: entry["mean"] for seed, entry in entries.items()} for label, entries in points.items()}
    counts = {label: min(entry["n"] for entry in entries.values()) for label, entries in points.items()}
    if all(len(seeds) == 1 for seeds in shares.values()):  # of the questions alone
        ends = [(entry["low"], entry["high"]) for entries in points.values() for entry in entries.values()]
    else:
        ends = intervals_over_seeds([Trainings(tuple(seeds.values()), counts[name]) for name, seeds in shares.items()])
    return {
        label: Accuracy(sum(seeds.values()) / len(seeds), low, high, counts[label], seeds)
        for (label, seeds), (low, high) in zip(shares.items(), ends, strict=True)
    }


def _combine(
    label: str, runs: list[dict[str, Any]], accuracy: dict[str, Accuracy], hard: dict[str, Accuracy]
) -> FrontierPoint:
    costs: dict[str, Number] = {}
    for key in AXES:
        known = [cost[key] for cost in map(total_costs, runs) if key in cost]
        if known:
            costs[key] = sum(known) / len(known)
    return FrontierPoint(label, runs[0]["connector"], costs, accuracy, hard, tuple(runs))


def measured_axes(points: Sequence[FrontierPoint]) -> dict[str, Axis]:
    """The entries of AXES for which a point has a cost."""
    return {key: axis for key, axis in AXES.items() if any(key in point.costs for point in points)}


def tasks_of(results: Sequence[dict[str, Any]]) -> list[str]:
    """Every task of the results, in order of first appearance."""
    return list(dict.fromkeys(task for result in results for task in result["accuracy"]))


def front_of(points: Sequence[FrontierPoint], task: str, axis: str) -> list[int]:
    """Indices of the points on the Pareto front of a task's accuracy against a cost, including controls."""
    having = [i for i, point in enumerate(points) if task in point.accuracy and axis in point.costs]
    front = pareto_front([(points[index].costs[axis], points[index].accuracy[task].mean) for index in having])
    return [having[position] for position in front]


def styles(connectors: Sequence[str], controls: frozenset[str]) -> dict[str, Style]:
    """A colour and a marker for every connector: bright for candidates, grey and dashed for controls."""
    made = {}
    for is_control, palette in ((False, COLORS), (True, CONTROL_COLORS)):
        members = [name for name in dict.fromkeys(connectors) if (name in controls) == is_control]
        for index, name in enumerate(members):
            # Controls take markers from the end of the list, so that they rarely share a candidate's.
            marker, symbol = MARKERS[(-1 - index if is_control else index) % len(MARKERS)]
            made[name] = Style(palette[index % len(palette)], marker, symbol, is_control)
    return {name: made[name] for name in dict.fromkeys(connectors)}


def axis_scale(points: Sequence[FrontierPoint], axis: str) -> str:
    """`log` for tokens and for costs with a wide range, `linear` for others."""
    costs = [point.costs[axis] for point in points if axis in point.costs]
    if not costs or min(costs) <= 0:
        return "linear"
    return "log" if axis == "tokens" or max(costs) >= LOG_FROM_RATIO * min(costs) else "linear"


def log_ticks(points: Sequence[FrontierPoint], axis: str) -> list[float]:
    """Ticks of a logarithmic axis, in displayed units: token counts that do not overlap, or round numbers."""
    counts = sorted({point.costs[axis] / AXES[axis].divisor for point in points if axis in point.costs})
    low, high = counts[0], counts[-1]
    if axis == "tokens":
        if len(counts) <= 12 and all(b >= 1.25 * a for a, b in itertools.pairwise(counts)):
            return [float(count) for count in counts]
        return [2.0**power for power in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    steps = (1, 1.5, 2, 3, 5, 7) if high <= 12 * low else (1, 2, 5) if high <= 1e3 * low else (1,)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{step}e{power}") for power in powers for step in steps]
    return [tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]


def dodge(points: Sequence[FrontierPoint]) -> list[float]:
    """Factor of each point's token count when drawn, so that equal counts do not overlap."""
    names = list(dict.fromkeys(point.connector for point in points))
    factors = []
    for point in points:
        beside = {other.connector for other in points if other.costs["tokens"] == point.costs["tokens"]}
        order = sorted(beside, key=names.index)
        place = order.index(point.connector) - (len(order) - 1) / 2
        step = min(DODGE_OCTAVES, WIDEST_DODGE / max(1, len(order) - 1))
        factors.append(2.0 ** (step * place))
    return factors


def drawn_costs(points: Sequence[FrontierPoint], axis: str) -> dict[int, float]:
    """Coordinates of points on a horizontal axis, in displayed units, by index of the points with that cost."""
    side_by_side = (axis, axis_scale(points, axis)) == ("tokens", "log")
    factors = dodge(points) if side_by_side else [1.0] * len(points)
    return {
        index: factors[index] * point.costs[axis] / AXES[axis].divisor
        for index, point in enumerate(points)
        if axis in point.costs
    }


def frontier_figure(results: Sequence[dict[str, Any]], *, controls: frozenset[str]) -> Figure:
    """Draws accuracy per task (rows) against visual tokens and against FLOPs (columns).

    Args:
      results: one dict per point and seed, as written by the sweep.
      controls: connectors that are drawn grey and dashed.

    Returns:
      A figure 1600 pixels wide. Error bars are 95% intervals, rings and the step line are the
      Pareto front.

    Raises:
      ValueError: nothing to draw; see `combine_seeds`.
    """
    points, tasks = combine_seeds(results), tasks_of(results)
    figure = Figure(figsize=(10, 1.3 + 2.7 * len(tasks)), dpi=160, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr]
    panels = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    for row, task in zip(panels, tasks, strict=True):
        for panel, axis in zip(row, ("tokens", "flops"), strict=True):
            _draw_panel(panel, points, task, axis, controls)
        row[0].set_ylabel("accuracy")
    for panel, axis in zip(panels[-1], ("tokens", "flops"), strict=True):
        unit = AXES[axis].unit
        panel.set_xlabel(AXES[axis].title + (f" ({unit})" if unit else ""))
    figure.align_ylabels()
    looks = styles([point.connector for point in points], controls)
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, linestyle="--" if look.dashed else "-")
        for look in looks.values()
    ]
    ring = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": "black", "markersize": 10}
    handles.append(Line2D([], [], color=FRONT_COLOR, linewidth=5, **ring))
    names = [f"{name} (control)" if name in controls else name for name in looks]
    legend = figure.legend(
        handles,
        [*names, "Pareto front"],
        loc="outside upper center",
        ncols=5,
        frameon=False,
        title="Accuracy against cost, with 95% intervals",
    )
    legend.get_title().set_fontsize(13)
    return figure


def _draw_panel(panel: Axes, points: Sequence[FrontierPoint], task: str, axis: str, controls: frozenset[str]) -> None:
    """Draws one task against one cost."""
    looks, at = styles([point.connector for point in points], controls), drawn_costs(points, axis)
    for name, look in looks.items():
        drawn = [i for i, point in enumerate(points) if point.connector == name and task in point.accuracy]
        drawn.sort(key=lambda i: at[i])
        shares = [points[i].accuracy[task] for i in drawn]
        panel.errorbar(
            [at[i] for i in drawn],
            [share.mean for share in shares],
            # Rounding may put a mean of 1 slightly above its interval.
            yerr=[
                [max(0.0, share.mean - share.low) for share in shares],
                [max(0.0, share.high - share.mean) for share in shares],
            ],
            color=look.color,
            marker=look.marker,
            linestyle="--" if look.dashed else "-",
            label=name,
            markersize=5,
            linewidth=1.2,
            elinewidth=0.9,
            capsize=2,
        )
        dots = [
            (at[i], share)
            for i in drawn
            if len(points[i].runs) > 1
            for share in points[i].accuracy[task].seeds.values()
        ]
        if dots:
            panel.plot(*zip(*dots, strict=True), ".", color=look.color, markersize=3, alpha=0.6, gid="seeds")
    front = front_of(points, task, axis)
    across, up = [at[i] for i in front], [points[i].accuracy[task].mean for i in front]
    panel.step(across, up, where="post", color=FRONT_COLOR, linewidth=5, zorder=1, gid="front")
    panel.plot(across, up, "o", markerfacecolor="none", markeredgecolor="black", markersize=11, gid="rings")
    counts = sorted({point.accuracy[task].n for point in points if task in point.accuracy})
    asked = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    panel.set_title(f"{task}  ({asked} questions, {told_seeds(points)})", loc="left", fontsize=10, parse_math=False)
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panel.grid(color="0.9", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    if axis_scale(points, axis) == "log":
        panel.set_xscale("log", base=2 if axis == "tokens" else 10)
        panel.minorticks_off()
        panel.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}"))
        panel.xaxis.set_major_locator(FixedLocator(log_ticks(points, axis)))
    else:
        panel.xaxis.set_major_locator(MaxNLocator(5))  # so that labels of several digits have room


def told_seeds(points: Sequence[FrontierPoint]) -> str:
    """How many seeds the points have, as `5 seeds` or `1 to 5 seeds`."""
    counts = sorted({len(point.runs) for point in points})
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{number} seed{'' if number == '1' else 's'}"


def draw_frontier(results: Sequence[dict[str, Any]], path: epath.Path, *, controls: frozenset[str]) -> None:
    """Writes `frontier_figure` as a PNG, over an earlier one.

    Raises:
      ValueError: nothing to draw; see `combine_seeds`. No file is written.
    """
    drawn = io.BytesIO()
    frontier_figure(results, controls=controls).savefig(drawn, format="png")
    replace_whole(path, drawn.getvalue())


def replace_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that it is always complete."""
    draft = path.with_name(path.name + ".partial")
    draft.write_bytes(content)
    draft.replace(path)

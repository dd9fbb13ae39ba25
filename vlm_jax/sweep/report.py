"""The report of a sweep: one self-contained HTML file with a chart, a table and sample images."""

import base64
import dataclasses
import io
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from etils import epath
from jaxtyping import UInt8
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

from vlm_jax.processors.boxes import parse_boxes, to_pixels
from vlm_jax.sweep.findings import find
from vlm_jax.sweep.frontier import (
    AXES,
    Accuracy,
    FrontierPoint,
    Number,
    axis_scale,
    combine_seeds,
    drawn_costs,
    front_of,
    log_ticks,
    measured_axes,
    replace_whole,
    styles,
    tasks_of,
    total_costs,
)
from vlm_jax.sweep.retained import Cell, Retained, Share

Rectangle = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with a question, and the answer of every point.

    Attributes:
      image: the image, grey (1 channel) or RGB (3 channels).
      question: the question.
      reference: the correct answer.
      task: determines the metric.
      answers: {point label, as `pool@16`: (text, whether it is correct or how much of it)}.
    """

    image: UInt8[np.ndarray, "height width channels"]
    question: str
    reference: str
    task: str
    answers: dict[str, tuple[str, bool | float]]


def write_report(
    results: Sequence[dict[str, Any]],
    path: epath.Path,
    *,
    controls: frozenset[str],
    examples: Sequence[Example],
    title: str,
    retained: Retained | None = None,
) -> None:
    """Writes the report as one self-contained HTML file, over an earlier one.

    Args:
      results: one dict per point and seed, as written by the sweep.
      path: path of the file.
      controls: connectors that only serve as comparison.
      examples: sample images, in the order shown; may be empty.
      title: title of the HTML page.
      retained: what the points retain, and their ranks; None for none.

    Raises:
      ValueError: nothing to report; see `combine_seeds`. No file is written.
    """
    page = report_html(results, controls=controls, examples=examples, title=title, retained=retained)
    replace_whole(path, page.encode())


def report_html(
    results: Sequence[dict[str, Any]],
    *,
    controls: frozenset[str],
    examples: Sequence[Example],
    title: str,
    retained: Retained | None = None,
) -> str:
    """The HTML of `write_report`; all text of the results and examples is escaped."""
    points, tasks = combine_seeds(results), tasks_of(results)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # the legend has the sweep's order
    environment.filters |= {
        "percent": percent,
        "quantity": quantity,
        "verdict": verdict,
        "standing": standing,
        "ends": ends,
    }
    room = resources.files("vlm_jax.sweep")
    template = environment.from_string((room / "report.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        tasks=tasks,
        axes=measured_axes(points),
        controls=[name for name in dict.fromkeys(point.connector for point in points) if name in controls],
        findings=[finding for task in tasks for finding in find(points, task, controls)],
        hard=[point for point in points if point.hard],
        retained=retained,
        columns=[] if retained is None else _columns(retained),
        rows=table_rows(points, tasks),
        chart=chart_data(points, tasks, controls),
        cards=[card(example) for example in examples],
        scores=score_examples(points, examples),
        style=Markup((room / "report.css").read_text(encoding="utf-8")),
        script=Markup((room / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
    )


def percent(share: Number) -> str:
    """A share in [0, 1], in percent with one decimal."""
    return f"{100 * share:.1f}"


def verdict(correct: bool | float) -> str:
    """Whether an answer is right, or how much of it."""
    if 0 < correct < 1:
        return f"{percent(correct)}% right"
    return "✓ right" if correct else "✗ wrong"


def standing(cell: Cell) -> str:
    """The rank of a cell with its interval, and how often it is the best; empty without one."""
    rank = cell.rank
    if rank is None:
        return ""
    if rank.low is None or rank.high is None or rank.best is None:
        return f"rank {quantity(rank.rank)} [–], best –"
    low, high = quantity(rank.low), quantity(rank.high)
    return f"rank {quantity(rank.rank)} [{low}, {high}], best {100 * rank.best:.0f}%"


def ends(share: Share) -> str:
    """The interval of a share in per cent; a dash without one."""
    return "[–]" if share.low is None or share.high is None else f"[{share.low:.1f}, {share.high:.1f}]"


def _columns(retained: Retained) -> list[tuple[str, str, str]]:
    """(heading, field of a `Kept`, name in it) of what is retained; the field has no names where it is one cell."""
    groups = [(name, "groups", name) for name in retained.groups]
    return [("all", "overall", ""), *groups, *((name, "benchmarks", name) for name in retained.benchmarks)]


def quantity(value: Number) -> str:
    """A number with three significant digits or more, without an exponent where it is readable."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table_rows(points: Sequence[FrontierPoint], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """One row per run, with the fronts that include its point, by task."""
    fronts = {task: {axis: front_of(points, task, axis) for axis in ("tokens", "flops")} for task in tasks}
    return [
        {
            "point": point,
            "run": run,
            "costs": {key: cost / AXES[key].divisor for key, cost in total_costs(run).items()},
            "peak_mib": None if run["peak_bytes"] is None else run["peak_bytes"] / 2**20,
            "fronts": {task: [axis for axis, on in fronts[task].items() if index in on] for task in tasks},
        }
        for index, point in enumerate(points)
        for run in point.runs
    ]


def chart_data(points: Sequence[FrontierPoint], tasks: Sequence[str], controls: frozenset[str]) -> dict[str, Any]:
    """Input of the chart's script: costs in displayed units, accuracies, fronts as indices of points."""
    axes = measured_axes(points)
    drawn = {axis: drawn_costs(points, axis) for axis in axes}
    return {
        "tasks": list(tasks),
        "several_seeds": any(len(point.runs) > 1 for point in points),
        "axes": {
            key: {
                "title": axis.title + (f" ({axis.unit})" if axis.unit else ""),
                "scale": axis_scale(points, key),
                "ticks": log_ticks(points, key) if axis_scale(points, key) == "log" else None,
            }
            for key, axis in axes.items()
        },
        "points": [
            {
                "label": point.label,
                "connector": point.connector,
                "costs": {key: cost / AXES[key].divisor for key, cost in point.costs.items()},
                "drawn_costs": {axis: drawn[axis].get(index) for axis in axes},
                "accuracy": {task: dataclasses.asdict(share) for task, share in point.accuracy.items()},
                "details": details(point),
            }
            for index, point in enumerate(points)
        ],
        "fronts": {task: {axis: front_of(points, task, axis) for axis in axes} for task in tasks},
        "styles": {
            name: dataclasses.asdict(style) | {"control": name in controls}
            for name, style in styles([point.connector for point in points], controls).items()
        },
    }


def details(point: FrontierPoint) -> list[str]:
    """All numbers of a point, line by line."""

    def parts(key: str, divisor: float) -> str:
        names = point.runs[0][key]
        means = {name: sum(run[key][name] for run in point.runs) / len(point.runs) for name in names}
        return ", ".join(f"{name} {quantity(mean / divisor)}" for name, mean in means.items())

    def interval(share: Accuracy) -> str:
        return f"{percent(share.mean)}% [{percent(share.low)}, {percent(share.high)}], n = {share.n}"

    costs = {key: quantity(cost / AXES[key].divisor) for key, cost in point.costs.items()}
    peaks = [run["peak_bytes"] / 2**20 for run in point.runs if run["peak_bytes"] is not None]
    times = {
        "prefill_seconds": "prefill of an example",
        "decode_seconds": "new token of an example",
        "seconds_per_sample": "time of an answer",
        "chip_seconds": "predicted chip time of an example",
    }
    return [
        *(f"{task}: {interval(share)}" for task, share in point.accuracy.items()),
        f"visual tokens: {costs['tokens']}",
        f"GFLOPs: {costs['flops']} ({parts('flops', 1e9)})",
        f"parameters, M: {costs['parameters']} ({parts('num_params', 1e6)})",
        f"training step: {costs['step_seconds'] + ' ms' if 'step_seconds' in costs else 'not measured'}",
        f"peak memory: {f'{quantity(max(peaks))} MiB' if peaks else 'not measured'}",
        *(f"{name}: {costs[key]} ms" for key, name in times.items() if key in costs),
        f"seeds: {', '.join(str(run['seed']) for run in point.runs)}",
    ]


def card(example: Example) -> dict[str, Any]:
    """The template's data of an example: its image as a data URL, and every box in pixels."""
    height, width, _ = example.image.shape
    return {
        "example": example,
        "height": height,
        "width": width,
        "picture": picture_url(example.image),
        "reference_boxes": drawn_boxes(example.reference, height, width),
        "answer_boxes": {label: drawn_boxes(text, height, width) for label, (text, _) in example.answers.items()},
    }


def drawn_boxes(text: str, height: int, width: int) -> list[Rectangle]:
    """(left, top, width, height) in pixels of the image, of every well-formed box in a text."""
    corners = [to_pixels(box, height, width) for box in parse_boxes(text)]
    return [(left, top, right - left, bottom - top) for left, top, right, bottom in corners]


def picture_url(image: UInt8[np.ndarray, "height width channels"]) -> str:
    """An image as a `data:` URL of a PNG.

    Raises:
      ValueError: the number of channels is not 1 or 3.
    """
    channels = image.shape[-1]
    if channels not in (1, 3):
        raise ValueError(f"expected an image of 1 or 3 channels, got shape {image.shape}")
    encoded = io.BytesIO()
    Image.fromarray(image[..., 0] if channels == 1 else image).save(encoded, format="PNG")
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")


def score_examples(points: Iterable[FrontierPoint], examples: Sequence[Example]) -> dict[str, tuple[int, int]]:
    """{label: (wholly correctly answered examples, answered examples)}, in the order of the points."""
    given = dict.fromkeys(label for example in examples for label in example.answers)
    known = [point.label for point in points if point.label in given]
    scores = {}
    for label in dict.fromkeys([*known, *given]):
        correct = [example.answers[label][1] for example in examples if label in example.answers]
        scores[label] = (sum(share == 1 for share in correct), len(correct))
    return scores

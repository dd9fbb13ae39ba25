"""Plans of budgets, connectors and slices, joined with what a finished sweep or evaluation measured."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib.ticker
from etils import epath
from matplotlib.figure import Figure

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.config import ConfigError
from vlm_jax.planner.plan import Plan
from vlm_jax.planner.request import Request
from vlm_jax.planner.topology import PlanError
from vlm_jax.sweep.frontier import replace_whole, styles
from vlm_jax.sweep.report import write_report
from vlm_jax.sweep.run import drawable
from vlm_jax.types import Fields

PLANS_FILE, FIGURE_FILE, REPORT_FILE = "plans.json", "plans.png", "report.html"
RELEASED = "released"  # the connector of a release, where none is named


@dataclasses.dataclass(frozen=True)
class PlannedPoint:
    """One connector at one budget on one slice.

    Attributes:
      connector: its kind; `released` for the release's own.
      token_budget: None for the release's number.
      topology: of the slice.
      plan: None where the point cannot be planned.
      refused: why there is none.
    """

    connector: str
    token_budget: int | None
    topology: str
    plan: Plan | None
    refused: str = ""

    @property
    def label(self) -> str:
        """As in a sweep."""
        return f"{self.connector}@{self.token_budget}"

    def to_json(self) -> Fields:
        """As JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "plan": None if self.plan is None else self.plan.to_json()}


def planned_points(
    request: Request,
    make: Callable[[Request], Plan],
    *,
    budgets: Sequence[int | None],
    connectors: Sequence[str],
    topologies: Sequence[str],
) -> Iterator[PlannedPoint]:
    """The plans of a sweep, one after another; a point that cannot be planned has the reason instead.

    Args:
      request: of everything else.
      make: makes a plan.
      budgets, connectors, topologies: whose product is planned; `released` is the release's own connector.
    """
    for topology in topologies:
        for connector in connectors:
            for budget in budgets:
                kind = None if connector == RELEASED else connector
                try:
                    own = request.changed(topology=topology, token_budget=budget)
                    own = own if kind is None else own.changed(connector__kind=kind)
                    yield PlannedPoint(connector, budget, topology, make(own))
                except (ConfigError, InfeasibleBudget, PlanError) as error:
                    yield PlannedPoint(connector, budget, topology, None, str(error))


def write_plans(points: Sequence[PlannedPoint], folder: epath.Path) -> list[epath.Path]:
    """Writes `plans.json`, and `plans.png` where any point has a time; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / PLANS_FILE]
    replace_whole(written[0], json.dumps([point.to_json() for point in points], indent=1).encode())
    if any(point.plan is not None and point.plan.step_time is not None for point in points):
        written.append(folder / FIGURE_FILE)
        with written[1].open("wb") as file:
            plans_figure(points).savefig(file, format="png")
    return written


def plans_figure(points: Sequence[PlannedPoint]) -> Figure:
    """Predicted milliseconds of a step against visual tokens, one panel a slice, with the predicted range."""
    topologies = list(dict.fromkeys(point.topology for point in points))
    figure = Figure(figsize=(5 * len(topologies), 4), dpi=160, layout="constrained")
    looks = styles([point.connector for point in points], frozenset())
    for panel, topology in zip(figure.subplots(1, len(topologies), squeeze=False)[0], topologies, strict=True):
        for name, look in looks.items():
            own = [one for one in points if (one.topology, one.connector) == (topology, name)]
            timed = [(one.token_budget or 0, one.plan.step_time) for one in own if one.plan is not None]
            drawn = sorted(((budget, time) for budget, time in timed if time is not None), key=lambda pair: pair[0])
            middle = [1e3 * time.seconds for _, time in drawn]
            spread = [
                [1e3 * (time.seconds - time.low) for _, time in drawn],
                [1e3 * (time.high - time.seconds) for _, time in drawn],
            ]
            budgets = [budget for budget, _ in drawn]
            panel.errorbar(budgets, middle, yerr=spread, color=look.color, marker=look.marker, label=name, capsize=2)
        panel.set_title(topology)
        panel.set_xlabel("visual tokens of an image (0: as released)")
        panel.set_ylabel("predicted ms of a step (estimate)")
        panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        panel.legend(frameon=False)
    return figure


def joined(results: Sequence[Fields], points: Sequence[PlannedPoint], topology: str) -> list[Fields]:
    """The results of a sweep or an evaluation that have a plan on a slice, with its predicted seconds.

    A point of a sweep is a connector or a reducer at a budget; it is found by that name and number. `none`, a release
    that an evaluation leaves as it is, has the plan of its own connector.

    Args:
      results: lines of `results.jsonl`.
      points: of the plans.
      topology: the slice whose chip time is the cost.

    Raises:
      ConfigError: no result has a plan.
    """
    seconds = {
        (one.connector, one.token_budget): one.plan.step_time.seconds * one.plan.num_devices
        for one in points
        if one.topology == topology and one.plan is not None and one.plan.step_time is not None
    }
    names = [RELEASED if result["connector"] == "none" else result["connector"] for result in results]
    keys = [(name, result["token_budget"]) for name, result in zip(names, results, strict=True)]
    found = [
        {**result, "chip_seconds": seconds[key] / _rows(points, key, topology)}
        for result, key in zip(results, keys, strict=True)
        if key in seconds
    ]
    if not found:
        planned = ", ".join(sorted(f"{name}@{budget}" for name, budget in seconds)) or "none"
        measured = ", ".join(sorted({f"{name}@{budget}" for name, budget in keys}))
        raise ConfigError(f"--join: no result has a plan with a time on {topology}; planned {planned}, got {measured}")
    return found


def _rows(points: Sequence[PlannedPoint], key: tuple[Any, Any], topology: str) -> int:
    plans = [one.plan for one in points if (one.connector, one.token_budget) == key and one.topology == topology]
    assert plans[0] is not None
    return plans[0].rows


def write_joined_report(results: Sequence[Fields], folder: epath.Path, *, title: str) -> epath.Path:
    """Writes the frontier of accuracy against predicted chip time as `report.html`; returns the file.

    Args:
      results: from `joined`.
      folder: exists.
      title: of the page.
    """
    path = folder / REPORT_FILE
    write_report([drawable(result) for result in results], path, controls=frozenset(), examples=(), title=title)
    return path

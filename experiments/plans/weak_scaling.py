"""Weak scaling on paper: the same rows a chip on slices of v5p from 8 to 512 chips, as a figure.

    python experiments/plans/weak_scaling.py [--most=512]

Above: predicted time of a step, with its range, and the communication that nothing hides. Below: time of each kind of
collective on the links, the largest of which limits the scaling. Finished plans are kept, so that a second run resumes.
"""

import argparse
import json
import math
import pathlib

import jax
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from plans import request_for  # sets the platform of JAX

from vlm_jax.cli.plan_output import working
from vlm_jax.planner.kept import FOLDER
from vlm_jax.planner.plan import Plan
from vlm_jax.planner.request import make_plan

RELEASE, ROWS = "Qwen/Qwen2.5-VL-7B-Instruct", 4  # rows of a chip
SLICES = ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


def row(chips: int, plan: Plan) -> dict:
    """One slice, in milliseconds; of collectives the seconds on the links by kind."""
    own = plan.step_time
    assert own is not None and plan.moved is not None, plan.refused
    kinds: dict[str, float] = {}
    for one in plan.moved:
        kinds[one.kind] = kinds.get(one.kind, 0.0) + one.seconds
    found = {"chips": chips, "peak_gib": plan.memory.peak / 2**30, "ms": 1e3 * own.seconds, "low_ms": 1e3 * own.low}
    found |= {"high_ms": 1e3 * own.high, "exposed_ms": 1e3 * own.exposed, "mfu": own.mfu}
    return {**found, "collectives_ms": {kind: 1e3 * seconds for kind, seconds in kinds.items()}}


def draw(rows: list[dict], path: pathlib.Path) -> None:
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    chips = [one["chips"] for one in rows]
    above.fill_between(chips, [one["low_ms"] for one in rows], [one["high_ms"] for one in rows], alpha=0.2)
    above.plot(chips, [one["ms"] for one in rows], marker="o", label="step, with its range")
    above.plot(chips, [one["exposed_ms"] for one in rows], marker="s", label="exposed communication")
    for one in rows:
        above.annotate(f"{one['mfu']:.0%}", (one["chips"], one["ms"]), (0, 7), textcoords="offset points", ha="center")
    for number, kind in enumerate(sorted({kind for one in rows for kind in one["collectives_ms"]})):
        below.plot(
            chips, [one["collectives_ms"].get(kind, math.nan) for one in rows], marker="os^vD"[number], label=kind
        )
    for panel in (above, below):
        panel.set_ylim(bottom=0)
        panel.set_ylabel("ms a step, predicted")
        panel.legend(frameon=False)
    above.set_title(f"{RELEASE}, {ROWS} rows of 4,096 a chip; % is MFU", fontsize=10)
    below.set_xscale("log", base=2)
    below.xaxis.set_major_locator(FixedLocator(chips))
    below.xaxis.set_minor_locator(NullLocator())
    below.set_xticklabels(map(str, chips))
    below.set_xlabel("chips of v5p")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--most", type=int, default=512)
    parser.add_argument("--workdir", default="workdir/plans")
    given = parser.parse_args()
    folder = pathlib.Path(given.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in SLICES:
        chips = math.prod(map(int, name.split("x")))
        if chips <= given.most:
            request = request_for(RELEASE, f"v5p:{name}", "train", rows=ROWS)
            rows.append(row(chips, make_plan(request, FOLDER, working)[0]))
            (folder / "weak_scaling.json").write_text(json.dumps(rows, indent=1))
            draw(rows, folder / "weak_scaling.png")
            jax.clear_caches()  # a gigabyte a plan
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

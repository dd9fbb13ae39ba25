"""What `cli.plan` prints: plans as tables, and a line while one is compiled."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

import rich.console
import rich.progress
import rich.table

from vlm_jax.cli.progress import duration
from vlm_jax.planner.plan import Plan
from vlm_jax.planner.search import Candidate
from vlm_jax.sweep.planned import PlannedPoint

GIB = 2**30
NOT_PLANNED = "not planned"
LINES = 6  # of temporaries and collectives


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """Shows that a compilation is under way: a live line on a terminal, elsewhere one line before and one after."""
    since = time.monotonic()
    if sys.stderr.isatty():
        console = rich.console.Console(stderr=True, markup=False, highlight=False)
        columns = (
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("compiling {task.description}", markup=False),
            rich.progress.TimeElapsedColumn(),
        )
        with rich.progress.Progress(*columns, console=console, transient=True) as bar:
            bar.add_task(text, total=None)
            yield
        return
    print(f"compiling {text} (minutes for billions of parameters)", file=sys.stderr, flush=True)
    yield
    print(f"compiled {text} in {duration(time.monotonic() - since)}", file=sys.stderr, flush=True)


def plan_tables(plan: Plan) -> list[rich.table.Table]:
    """A plan as tables: memory with its contributors, communication, and time."""
    return [_memory(plan), *([] if plan.moved is None else [_collectives(plan)]), _time(plan)]


def _memory(plan: Plan) -> rich.table.Table:
    used, spare = plan.memory, plan.memory.spare / GIB
    verdict = f"fits with {spare:.2f} GiB to spare" if used.fits else f"does not fit: {-spare:.2f} GiB too much"
    shape = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "one device"
    table = rich.table.Table("GiB a device", "", title=f"{plan.stage} on {plan.topology} ({shape}): {verdict}")
    for one in plan.parameters:
        table.add_row(f"{one.bytes / GIB:.3f}", f"{one.name}, {one.count:,} elements over all devices")
    table.add_section()
    parts = {"temporaries": used.temporaries, "results": used.outputs, "program": used.code}
    for name, size in parts.items():
        table.add_row(f"{size / GIB:.3f}", name)
    table.add_section()
    table.add_row(f"{used.peak / GIB:.3f}", f"peak of {used.available / GIB:.2f} GiB")
    table.add_section()
    for one in plan.temporaries[:LINES]:
        table.add_row(f"{one.bytes / GIB:.3f}", f"temporary {one.shape} of {one.name[-80:]}")
    return table


def _collectives(plan: Plan) -> rich.table.Table:
    table = rich.table.Table("collective", "axes", "runs", "MiB sent", "ms", title="communication of a device")
    assert plan.moved is not None
    for one in plan.moved:
        axes = " and ".join(one.axes) or "none of the mesh"
        table.add_row(one.kind, axes, str(one.times), f"{one.sent / 2**20:.2f}", f"{1e3 * one.seconds:.3f}")
    return table


def _time(plan: Plan) -> rich.table.Table:
    table = rich.table.Table("", "", title="estimate of a step", show_header=False)
    table.add_row("FLOPs a device", f"{plan.flops:.4g}, of them without recomputation {plan.model_flops:.4g}")
    if plan.step_time is None:
        table.add_row("time", f"not predicted: {plan.refused}")
    else:
        own = plan.step_time
        table.add_row("time", f"{1e3 * own.seconds:.4g} ms ({1e3 * own.low:.4g} to {1e3 * own.high:.4g})")
        table.add_row("model FLOPs utilisation", f"{own.mfu:.1%}")
        table.add_row("tokens a second", f"{plan.tokens_per_second:,.0f}")
        terms = {"products at the peak": own.compute, "memory at its bandwidth": own.memory}
        terms |= {"compiler's cycles": own.instructions, "of these by bytes": own.instructions * own.without_cycles}
        terms |= {"attention kernels": own.kernels}
        for name, seconds in (terms | {"exposed communication": own.exposed}).items():
            table.add_row(f"  {name}", f"{1e3 * seconds:.4g} ms")
    for line in plan.assumptions:
        table.add_row("assumes", line)
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    table.add_row("compiled", f"by {versions} in {plan.compile_seconds:.0f} s")
    return table


def search_tables(found: Sequence[Candidate]) -> list[rich.table.Table | str]:
    """Candidates of a search, the best first, and why some have no plan."""
    table = rich.table.Table("mesh", "remat", "peak GiB", "fits", "ms a step", "MFU", title="meshes and remat policies")
    for one in found:
        mesh = " ".join(f"{axis}={size}" for axis, size in one.mesh.items() if size > 1) or "one device"
        if one.plan is None:
            table.add_row(mesh, one.remat, "", NOT_PLANNED, "", "")
            continue
        timed = one.plan.step_time
        numbers = ("", "") if timed is None else (f"{1e3 * timed.seconds:.4g}", f"{timed.mfu:.1%}")
        fits = "yes" if one.plan.memory.fits else "no"
        table.add_row(mesh, one.remat, f"{one.plan.memory.peak / GIB:.2f}", fits, *numbers)
    return [table, *dict.fromkeys(one.refused for one in found if one.plan is None)]


def sweep_tables(points: Sequence[PlannedPoint]) -> list[rich.table.Table | str]:
    """Points of a sweep, in its order, and why some have no plan."""
    columns = ("slice", "connector", "budget", "peak GiB", "fits", "ms a step", "tokens a second")
    table = rich.table.Table(*columns, title="plans, all of them estimates")
    for one in points:
        name = (one.topology, one.connector, str(one.token_budget or "released"))
        if one.plan is None:
            table.add_row(*name, "", NOT_PLANNED, "", "")
            continue
        timed = one.plan.step_time
        speed = one.plan.tokens_per_second
        numbers = ("" if timed is None else f"{1e3 * timed.seconds:.4g}", "" if speed is None else f"{speed:,.0f}")
        table.add_row(*name, f"{one.plan.memory.peak / GIB:.2f}", "yes" if one.plan.memory.fits else "no", *numbers)
    return [table, *dict.fromkeys(f"{one.label}: {one.refused}" for one in points if one.plan is None)]

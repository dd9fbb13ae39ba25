"""Meshes and remat policies that fit a slice, ranked by predicted time; and the largest batch of generation."""

import dataclasses
from collections.abc import Callable, Iterator

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.config import ConfigError, parse
from vlm_jax.planner.plan import Plan
from vlm_jax.planner.request import Request, Working, make_plan, quietly
from vlm_jax.planner.settings import has_experts, planned, remat_parts
from vlm_jax.planner.topology import PlanError, open_topology
from vlm_jax.sharding.mesh import CONTEXT, DATA, EXPERT, FSDP, TENSOR, MeshSettings

REMAT = ("none", "dots", "full")  # from most memory to least
MAX_SIZES = {TENSOR: 8, DATA: 8, CONTEXT: 4, EXPERT: 8}  # devices along an axis beside `fsdp`
ROUNDS = 8  # batches that are tried for the largest
CLOSE = 0.02  # share of the rows by which the largest batch may be missed


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One mesh with one remat policy.

    Attributes:
      mesh: size of every axis.
      remat: policy of every part that has one; empty where none has.
      plan: for its time where the candidate was compiled for it, else for its memory; None where it cannot be made.
      refused: why there is none.
    """

    mesh: dict[str, int]
    remat: str
    plan: Plan | None
    refused: str = ""


def meshes(num_devices: int, given: MeshSettings, *, experts: bool) -> Iterator[dict[str, int]]:
    """Meshes of a slice: `fsdp` alone, and beside one other axis of a power of 2.

    Args:
      num_devices: of the slice.
      given: axes of the config; those of more than 1 are kept, but for `fsdp`.
      experts: whether the model has experts, which an axis can divide.
    """
    sizes = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    kept = {name: size if size > 1 and name != FSDP else 1 for name, size in sizes.items()}
    others = [{}] + [
        {name: 2**power}
        for name, most in MAX_SIZES.items()
        if kept[name] == 1 and (experts or name != EXPERT)
        for power in range(1, most.bit_length())
    ]
    for other in others:
        mesh = {**kept, **other}
        rest = num_devices
        for size in mesh.values():
            rest = rest // size if rest % size == 0 else 0
        if rest:
            yield {**mesh, FSDP: rest}


def search(
    request: Request,
    folder: str | None,
    working: Working = quietly,
    *,
    make: Callable[..., tuple[Plan, bool]] = make_plan,
) -> list[Candidate]:
    """Compiles every mesh for its memory, at a low optimisation level, and what fits for its time.

    Of each mesh the remat policy with the least recomputation that fits is compiled for its time; policies with more
    recomputation are not tried.

    Args:
      request: of training; its batch size is kept.
      folder, working: as of `make_plan`.
      make: makes a plan.

    Returns:
      First those with a time, the fastest first; then those that fit; then the others, the nearest to fitting first.

    Raises:
      ConfigError, InfeasibleBudget: of the config itself.
    """
    num_devices = len(open_topology(request.topology).devices)
    system = planned(request.config, num_devices, pictures=request.pictures)[1].system
    parts, given = remat_parts(system.model), parse(MeshSettings, request.config.mesh, "config.mesh")
    found = []
    for mesh in meshes(num_devices, given, experts=has_experts(system)):
        for remat in REMAT if parts else ("",):
            policies = {f"{part}__remat": remat for part in parts}
            asked = request.changed(**{f"mesh__{name}": size for name, size in mesh.items()}, **policies)
            one = _tried(asked.changed(quick=True), mesh, remat, folder, working, make)
            if one.plan is not None and one.plan.memory.fits:
                timed = _tried(asked, mesh, remat, folder, working, make)
                found.append(one if timed.plan is None else timed)
                break
            found.append(one)
            if one.plan is None:
                break
    return sorted(found, key=_rank)


def _tried(
    request: Request,
    mesh: dict[str, int],
    remat: str,
    folder: str | None,
    working: Working,
    make: Callable[..., tuple[Plan, bool]],
) -> Candidate:
    try:
        return Candidate(mesh, remat, make(request, folder, working)[0])
    except (ConfigError, InfeasibleBudget, PlanError) as error:
        return Candidate(mesh, remat, None, str(error))


def _rank(one: Candidate) -> tuple[int, float]:
    if one.plan is None:
        return 3, 0.0
    if one.plan.step_time is not None:
        return 0, one.plan.step_time.seconds
    return (1 if one.plan.memory.fits else 2), float(-one.plan.memory.spare)


def find_largest(request: Request, make: Callable[[Request], Plan]) -> Plan:
    """The plan of generation with the most rows that fit, up to `CLOSE`.

    A guess lies on the straight line of memory through two plans. Padding bends the line, and only a refused program
    says how much of a chip the compiler gives away, so that guesses also halve the way from the most rows that fit to
    the fewest that are refused. All are compiled for their memory; the result is compiled in full, with fewer rows
    where it takes more than that, unless the request is for memory alone.

    Args:
      request: of `prefill` or `decode`; its batch size is where the search starts.
      make: makes a plan.

    Raises:
      PlanError: not even the first batch fits, or memory does not grow with the batch.
    """
    fits = make(request.changed(quick=True))
    if not fits.memory.fits:
        raise PlanError(
            f"--largest_batch: {fits.rows} rows do not fit, {-fits.memory.spare} bytes too much; start at a smaller "
            "--batch_size"
        )
    unit, guess = fits.rows, 4 * fits.rows
    before: Plan | None = None
    refused: Plan | None = None
    for _ in range(ROUNDS):
        step = _step(fits.rows, unit)
        if refused is not None and refused.rows - fits.rows <= step:
            break
        tried = make(request.changed(quick=True, batch_size=guess))
        again = refused is not None and not tried.memory.fits
        before, fits, refused = (fits, tried, refused) if tried.memory.fits else (before, fits, tried)
        other = before if refused is None else refused
        assert other is not None
        guess = max(fits.rows + _step(fits.rows, unit), largest_batch((fits, other), unit))
        if refused is not None and (again or guess >= refused.rows):
            guess = max(fits.rows + unit, (fits.rows + refused.rows) // 2 // unit * unit)
    return _in_full(request, make, fits.rows, unit)


def _step(rows: int, unit: int) -> int:
    """Rows by which the largest batch may be missed."""
    return max(1, int(CLOSE * rows) // unit) * unit


def _in_full(request: Request, make: Callable[[Request], Plan], rows: int, unit: int) -> Plan:
    """The plan for the most rows up to so many that fits when it is compiled as the request says."""
    while rows > 0:
        plan = make(request.changed(batch_size=rows))
        if plan.memory.fits:
            return plan
        rows -= _step(rows, unit)
    raise PlanError("--largest_batch: no batch fits that is compiled in full, although one does for its memory alone")


def largest_batch(plans: tuple[Plan, Plan], unit: int) -> int:
    """The most rows of generation that fit, by the memory of two plans of different batches.

    Memory that does not grow with the batch (parameters, code) and memory that does (cache, activations) are told apart
    by a straight line through the two. What may be used is the smaller of what the two say: a refused plan has the
    compiler's limit, which is below the memory of the chip.

    Args:
      plans: of the same request, but for the batch size.
      unit: rows that the result is a multiple of.

    Raises:
      PlanError: memory does not grow with the batch.
    """
    first, second = sorted(plans, key=lambda plan: plan.rows)
    per_row = (second.memory.peak - first.memory.peak) / (second.rows - first.rows)
    if per_row <= 0:
        raise PlanError(
            f"--largest_batch: memory does not grow with the batch: {first.memory.peak} bytes for {first.rows} rows, "
            f"{second.memory.peak} for {second.rows}; start at a larger --batch_size"
        )
    fixed = first.memory.peak - per_row * first.rows
    available = min(first.memory.available, second.memory.available)
    return int((available - fixed) / per_row) // unit * unit

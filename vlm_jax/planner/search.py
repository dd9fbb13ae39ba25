"""Meshes and remat policies that fit a slice, ranked by predicted time; and the largest batch of generation."""

import dataclasses
import math
from collections.abc import Callable, Iterator

from vlm_jax.config import ConfigError
from vlm_jax.planner.plan import Plan
from vlm_jax.planner.request import Request, Working, make_plan, quietly
from vlm_jax.planner.topology import PlanError, open_topology

REMAT = ("none", "dots", "full")  # from most memory to least
MAX_TENSOR = 8  # chips that share the heads of a layer; more than the links of a ring nearby serve
TIMED = 3  # candidates that are compiled for their time
ROUNDS, CLOSE = (
    4,
    0.02,
)  # guesses of the largest batch; a guess that is closer to a plan than this share ends the search


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One mesh with one remat policy.

    Attributes:
      mesh: size of `fsdp` and `tensor`.
      remat: policy of encoder and decoder.
      plan: for its time where it is among those compiled for it, else for its memory; None where it cannot be made.
      refused: why there is none.
    """

    mesh: dict[str, int]
    remat: str
    plan: Plan | None
    refused: str = ""


def candidates(num_devices: int) -> Iterator[tuple[dict[str, int], str]]:
    """Meshes and remat policies, the least communication and recomputation first."""
    for power in range(int(math.log2(MAX_TENSOR)) + 1):
        tensor = 2**power
        if num_devices % tensor == 0:
            for remat in REMAT:
                yield {"fsdp": num_devices // tensor, "tensor": tensor}, remat


def search(
    request: Request,
    folder: str | None,
    working: Working = quietly,
    *,
    make: Callable[..., tuple[Plan, bool]] = make_plan,
) -> list[Candidate]:
    """Compiles every candidate for its memory, at a low optimisation level, and those that fit for their time.

    Args:
      request: of training; its batch size is kept.
      folder, working: as of `make_plan`.
      make: makes a plan.

    Returns:
      First those with a time, the fastest first; then those that fit; then the others, the nearest to fitting first.
    """
    found = []
    for mesh, remat in candidates(len(open_topology(request.topology).devices)):
        asked = _with(request, mesh, remat)
        try:
            found.append(Candidate(mesh, remat, make(asked.changed(quick=True), folder, working)[0]))
        except (ConfigError, PlanError) as error:
            found.append(Candidate(mesh, remat, None, str(error)))
    fitting = [one for one in found if one.plan is not None and one.plan.memory.fits][:TIMED]
    for one in fitting:
        timed = make(_with(request, one.mesh, one.remat), folder, working)[0]
        found[found.index(one)] = dataclasses.replace(one, plan=timed)
    return sorted(found, key=_rank)


def _with(request: Request, mesh: dict[str, int], remat: str) -> Request:
    axes = {f"mesh__{name}": size for name, size in {"data": 1, "context": 1, "expert": 1, **mesh}.items()}
    return request.changed(**axes, encoder__remat=remat, decoder__remat=remat)


def _rank(one: Candidate) -> tuple[int, float]:
    if one.plan is None:
        return 3, 0.0
    if one.plan.step_time is not None:
        return 0, one.plan.step_time.seconds
    return (1 if one.plan.memory.fits else 2), float(-one.plan.memory.spare)


def find_largest(request: Request, make: Callable[[Request], Plan]) -> Plan:
    """The plan of generation with the most rows that fit.

    Each guess lies on the straight line of memory through the two last plans; the first ones are small, and padding
    bends the line for them.

    Args:
      request: of `prefill` or `decode`; its batch size is where the search starts.
      make: makes a plan.

    Raises:
      PlanError: not even the first batch fits.
    """
    before = make(request.changed(quick=True))
    if not before.memory.fits:
        raise PlanError(f"--largest_batch: {before.rows} rows do not fit, {-before.memory.spare} bytes too much")
    unit, best = before.rows, before
    last = make(request.changed(quick=True, batch_size=4 * unit))
    for _ in range(ROUNDS):
        best = last if last.memory.fits and last.rows > best.rows else best
        guess = largest_batch((before, last), unit)
        if guess <= best.rows * (1 + CLOSE) and last.memory.fits:
            break
        before, last = best, make(request.changed(quick=True, batch_size=max(unit, guess)))
        if before.rows == last.rows:
            break
    best = last if last.memory.fits and last.rows > best.rows else best
    return make(request.changed(batch_size=best.rows))


def largest_batch(plans: tuple[Plan, Plan], unit: int) -> int:
    """The most rows of generation that fit, by the memory of two plans of different batches.

    Memory that does not grow with the batch (parameters, code) and memory that does (cache, activations) are told apart
    by a straight line through the two.

    Args:
      plans: of the same request, but for the batch size.
      unit: rows that the result is a multiple of.

    Raises:
      ValueError: equal batches, or memory that does not grow.
    """
    first, second = sorted(plans, key=lambda plan: plan.rows)
    if first.rows == second.rows:
        raise ValueError(f"expected plans of two batches, got {first.rows} rows twice")
    per_row = (second.memory.peak - first.memory.peak) / (second.rows - first.rows)
    if per_row <= 0:
        raise ValueError(f"memory does not grow with the batch: {first.memory.peak} and {second.memory.peak} bytes")
    fixed = first.memory.peak - per_row * first.rows
    return int((first.memory.available - fixed) / per_row) // unit * unit

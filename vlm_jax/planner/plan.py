"""A plan: what a compiled step takes of a slice that this machine does not have. All of it is an estimate."""

import dataclasses
import importlib.metadata
import pathlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax

from vlm_jax.costs.chips import Chip
from vlm_jax.costs.flops import KERNEL, flops_of, products_of
from vlm_jax.costs.kernels import visible_flops
from vlm_jax.planner.calibration import KERNEL_SHARE, SCALE, SPREAD, held_out_errors
from vlm_jax.planner.collectives import Collective, collectives
from vlm_jax.planner.compiler import compiled_for, text_of
from vlm_jax.planner.memory import Memory, Share, groups, largest_temporaries, of_compiled, of_refusal
from vlm_jax.planner.memory_traffic import hbm_bytes
from vlm_jax.planner.predict import Estimate, estimate
from vlm_jax.planner.program_text import UnreadableProgram, parse_program
from vlm_jax.planner.topology import PlanError, Topology, libtpu_version
from vlm_jax.types import Fields, Tree


@dataclasses.dataclass(frozen=True)
class Work:
    """A step to compile, traced on abstract values.

    Attributes:
      stage: `train`, `prefill` or `decode`.
      traced: the step's program before it is compiled.
      mesh: devices of a topology.
      arguments: the program's arguments by group, shapes with shardings.
      model_flops: of a step over all devices, without rematerialisation.
      rows: sequences of a step, over all devices.
      tokens: positions that a step computes, over all devices.
      visible: share of the pairs of positions that the masks of the decoder leave.
      details: model, lengths, budget and remat, for readers.
    """

    stage: str
    traced: jax.stages.Traced
    mesh: jax.sharding.Mesh
    arguments: Mapping[str, Tree]
    model_flops: int
    rows: int
    tokens: int
    visible: float
    details: Fields


@dataclasses.dataclass(frozen=True)
class Moved:
    """Collectives of one kind over the same mesh axes.

    Attributes:
      kind: as `all-gather`.
      axes: of the mesh.
      times: runs in a step.
      sent: bytes that a chip sends in a step.
      seconds: their time on the links, hidden by computation or not.
    """

    kind: str
    axes: tuple[str, ...]
    times: int
    sent: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """An estimate of one step on one slice; bytes, FLOPs and seconds are of one device.

    Attributes:
      stage, rows, tokens, details: as of `Work`.
      topology: name of the slice.
      chip: of its devices.
      num_devices: of the slice.
      mesh: size of every axis that is not 1.
      memory: bytes.
      parameters: groups of arguments, the largest first.
      temporaries: the largest results, the largest first; empty where the program's text cannot be read.
      flops: of the products that the program computes, rematerialised ones and attention in full included.
      model_flops: without rematerialised ones.
      traffic: bytes of the main memory; None where the text cannot be read.
      moved: communication; None likewise.
      step_time: None where it cannot be predicted.
      refused: why there is no time; empty where there is one.
      compile_seconds: of this plan.
      assumptions: in words.
      versions: of libtpu and jax.
    """

    stage: str
    rows: int
    tokens: int
    details: Fields
    topology: str
    chip: str
    num_devices: int
    mesh: dict[str, int]
    memory: Memory
    parameters: tuple[Share, ...]
    temporaries: tuple[Share, ...]
    flops: float
    model_flops: float
    traffic: float | None
    moved: tuple[Moved, ...] | None
    step_time: Estimate | None
    refused: str
    compile_seconds: float
    assumptions: tuple[str, ...]
    versions: dict[str, str]

    @property
    def tokens_per_second(self) -> float | None:
        """Over all devices, in the middle of the predicted range."""
        return None if self.step_time is None else self.tokens / self.step_time.seconds

    def to_json(self) -> Fields:
        """As JSON types."""
        return dataclasses.asdict(self)


def compile_plan(work: Work, topology: Topology, *, quick: bool = False) -> Plan:
    """Compiles a step for a slice, and reads from it what it takes.

    Args:
      work: traced for a mesh of the topology's devices.
      topology: the slice.
      quick: for memory alone.

    Raises:
      PlanError: the compiler fails other than for want of memory.
    """
    since, shares = time.perf_counter(), groups(work.arguments)
    flops = _flops(work)
    with tempfile.TemporaryDirectory(prefix="plan") as name:
        folder = pathlib.Path(name)
        try:
            compiled = compiled_for(work.mesh, work.traced, folder, quick=quick)
            found = of_compiled(compiled, int(topology.chip.hbm_bytes), folder)
            parts = _unread("compiled for its memory alone")
            if not quick:
                parts = _read(compiled, folder, work, topology.chip, flops)
        except jax.errors.JaxRuntimeError as error:
            refusal = of_refusal(str(error), sum(one.bytes for one in shares))
            if refusal is None:
                raise PlanError(f"{topology.name}: the compiler failed: {error}") from error
            found, parts = refusal, _unread("the program does not fit, so that there is none to read")
    return Plan(
        stage=work.stage,
        rows=work.rows,
        tokens=work.tokens,
        details=work.details,
        topology=topology.name,
        chip=topology.chip.name,
        num_devices=work.mesh.size,
        mesh={name: size for name, size in work.mesh.shape.items() if size > 1},
        memory=found,
        parameters=tuple(shares),
        temporaries=parts.temporaries,
        flops=flops.products + flops.kernels,
        model_flops=work.model_flops / work.mesh.size,
        traffic=parts.traffic,
        moved=parts.moved,
        step_time=parts.step_time,
        refused=parts.refused,
        compile_seconds=time.perf_counter() - since,
        assumptions=_assumptions(quick),
        versions={"libtpu": libtpu_version(), "jax": importlib.metadata.version("jax")},
    )


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What is read from a program's text; None where it cannot be."""

    traffic: float | None
    moved: tuple[Moved, ...] | None
    step_time: Estimate | None
    temporaries: tuple[Share, ...]
    refused: str


@dataclasses.dataclass(frozen=True)
class _Flops:
    """FLOPs of one device.

    Attributes:
      products: of all but kernels.
      kernels: of kernels, for every pair of a query and a key.
      visible: of kernels, for the pairs that masks leave.
    """

    products: float
    kernels: float
    visible: float


def _flops(work: Work) -> _Flops:
    jaxpr: Any = work.traced.jaxpr
    found = products_of(jaxpr.jaxpr)
    kernels = [(one, times) for one, times in found if one.primitive.name == KERNEL]
    return _Flops(
        sum(flops_of(one) * times for one, times in found if one.primitive.name != KERNEL) / work.mesh.size,
        sum(flops_of(one) * times for one, times in kernels) / work.mesh.size,
        sum(visible_flops(one, work.visible) * times for one, times in kernels) / work.mesh.size,
    )


def _unread(why: str) -> _Parts:
    return _Parts(None, None, None, (), why)


def _read(compiled: jax.stages.Compiled, folder: pathlib.Path, work: Work, chip: Chip, flops: _Flops) -> _Parts:
    try:
        program = parse_program(text_of(compiled, folder))
        found, traffic = collectives(program, dict(work.mesh.shape)), hbm_bytes(program)
        largest = tuple(largest_temporaries(program))
    except UnreadableProgram as error:
        return _unread(f"{error}; a time is not guessed")
    moved = _summed(found, chip)
    if chip.clock is None:
        return _Parts(traffic, moved, None, largest, f"the clock of {chip.name} is not known")
    given = {"flops": flops.products + flops.visible, "kernel_flops": flops.visible, "traffic": traffic}
    predicted = estimate(program, found, chip, model_flops=work.model_flops / work.mesh.size, **given)
    return _Parts(traffic, moved, predicted, largest, "")


def _summed(found: list[Collective], chip: Chip) -> tuple[Moved, ...]:
    kinds = defaultdict[tuple[str, tuple[str, ...]], list[Collective]](list)
    for one in found:
        kinds[one.kind, one.axes].append(one)
    summed = []
    for (kind, axes), own in kinds.items():
        times, sent = sum(one.times for one in own), sum(one.times * one.sent for one in own)
        summed.append(Moved(kind, axes, times, sent, sum(one.times * one.seconds(chip) for one in own)))
    return tuple(sorted(summed, key=lambda one: -one.sent))


def _assumptions(quick: bool) -> tuple[str, ...]:
    errors = ", ".join(f"{name} {error:+.0%}" for name, error in held_out_errors().items())
    if quick:
        return ("compiled at a low optimisation level: memory is within about 2% of the step's",)
    return (
        "an estimate by the TPU compiler's own cost model, not a measurement",
        f"attention kernels reach {KERNEL_SHARE:.0%} of the peak on the pairs that causal masks and windows leave; "
        "model FLOPs utilisation counts all pairs",
        "collectives are on rings whose links are at full speed, and wait for one another",
        "input, checkpoints and evaluation take no time from the devices",
        f"scale {SCALE}, range of {SPREAD:.0%} by published steps, each held out, and estimates of stand-ins by an "
        f"earlier compilation with libtpu 0.0.51: {errors}",
    )

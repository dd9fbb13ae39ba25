"""A plan: what a compiled step takes of a slice that this machine does not have. All of it is an estimate."""

import contextlib
import dataclasses
import importlib.metadata
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from vlm_jax.costs.chips import Chip
from vlm_jax.costs.flops import KERNEL, flops_of, products_of
from vlm_jax.planner.calibration import KERNEL_SHARE, SCALE, SPREAD, held_out_errors
from vlm_jax.planner.collectives import Collective, collectives
from vlm_jax.planner.memory import Memory, Share, groups, largest_temporaries, of_compiled, of_refusal
from vlm_jax.planner.memory_traffic import hbm_bytes
from vlm_jax.planner.predict import Estimate, estimate
from vlm_jax.planner.program_text import Program, UnreadableProgram, parse_program
from vlm_jax.planner.topology import PlanError, Topology, libtpu_version
from vlm_jax.sharding.rules import use_mesh
from vlm_jax.types import Fields, Tree

# Compiles in about half the time; memory is within 2%, and times mean nothing.
QUICK: Any = {"exec_time_optimization_effort": -1.0}


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
      details: what describes it: model, lengths, budget, remat.
    """

    stage: str
    traced: jax.stages.Traced
    mesh: jax.sharding.Mesh
    arguments: Mapping[str, Tree]
    model_flops: int
    rows: int
    tokens: int
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
    available, compiled = int(topology.chip.hbm_bytes), None
    try:
        with use_mesh(work.mesh), _without_cache():
            compiled = work.traced.lower().compile(compiler_options=dict(QUICK) if quick else None)
        found = of_compiled(compiled, available)
    except jax.errors.JaxRuntimeError as error:
        refusal = of_refusal(str(error), sum(one.bytes for one in shares))
        if refusal is None:
            raise PlanError(f"{topology.name}: the compiler failed: {error}") from error
        found = refusal
    program, refused = _text(compiled, quick)
    count = topology.chip, work.mesh.size
    flops, of_kernels = _flops(work.traced, work.mesh.size)
    parts = _Parts(None, None, None, (), refused)
    if program is not None:
        parts = _read(program, work, *count, flops=flops, kernel_flops=of_kernels)
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
        flops=flops,
        model_flops=work.model_flops / work.mesh.size,
        traffic=parts.traffic,
        moved=parts.moved,
        step_time=parts.step_time,
        refused=parts.refused,
        compile_seconds=time.perf_counter() - since,
        assumptions=_assumptions(quick),
        versions={"libtpu": libtpu_version(), "jax": importlib.metadata.version("jax")},
    )


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Compiles anew: JAX writes programs for absent devices to its cache, and cannot read them."""
    config: Any = jax.config  # whose flags have no types
    before = config.jax_enable_compilation_cache
    compilation_cache.reset_cache()
    config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        compilation_cache.reset_cache()
        config.update("jax_enable_compilation_cache", before)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What is read from a program's text; None where it cannot be."""

    traffic: float | None
    moved: tuple[Moved, ...] | None
    step_time: Estimate | None
    temporaries: tuple[Share, ...]
    refused: str


def _text(compiled: jax.stages.Compiled | None, quick: bool) -> tuple[Program | None, str]:
    """The program's text, or why there is none."""
    if compiled is None:
        return None, "the program does not fit, so that there is none to read"
    if quick:
        return None, "compiled for its memory alone"
    try:
        text: Any = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        return None, f"libtpu cannot print this program: {str(error).splitlines()[0]}"
    return parse_program(text), ""


def _flops(traced: jax.stages.Traced, num_devices: int) -> tuple[float, float]:
    """FLOPs of one device: all, and those of kernels."""
    jaxpr: Any = traced.jaxpr
    counted = [(flops_of(one) * times, one.primitive.name) for one, times in products_of(jaxpr.jaxpr)]
    kernels = sum(flops for flops, name in counted if name == KERNEL)
    return sum(flops for flops, _ in counted) / num_devices, kernels / num_devices


def _read(program: Program, work: Work, chip: Chip, num_devices: int, *, flops: float, kernel_flops: float) -> _Parts:
    try:
        found, traffic = collectives(program, dict(work.mesh.shape)), hbm_bytes(program)
        largest = tuple(largest_temporaries(program))
    except UnreadableProgram as error:
        return _Parts(None, None, None, (), f"{error}; a time is not guessed")
    moved = _summed(found, chip)
    if chip.clock is None:
        return _Parts(traffic, moved, None, largest, f"the clock of {chip.name} is not known")
    given = {"flops": flops, "kernel_flops": kernel_flops, "traffic": traffic}
    predicted = estimate(program, found, chip, model_flops=work.model_flops / num_devices, **given)
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
        f"attention kernels reach {KERNEL_SHARE:.0%} of the peak; collectives are rings over links at full speed",
        "input, checkpoints and evaluation take no time from the devices",
        f"scale {SCALE}, range of {SPREAD:.0%} by published steps, each held out: {errors}",
    )

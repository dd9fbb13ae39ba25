"""Communication between chips in a compiled program: kinds, mesh axes, bytes, and where each begins and ends."""

import dataclasses
import math
import re
from collections.abc import Mapping

from vlm_jax.costs.chips import Chip
from vlm_jax.planner.device_groups import axes_of, axes_of_pairs, device_groups, device_pairs, groups_of
from vlm_jax.planner.links import link_bytes, permuted_hops, sent_bytes
from vlm_jax.planner.program_text import Computation, Instruction, Program, num_bytes

PERMUTE = "collective-permute"
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", PERMUTE, "collective-broadcast")
_START, _DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
_SCATTER = "all-reduce-scatter"  # prefix of the name of a fusion that keeps a part of an all-reduce


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that moves bytes between chips.

    Attributes:
      kind: of `KINDS`.
      axes: mesh axes over which it is; empty where its groups are not along axes of the mesh.
      group: chips that take part together.
      given: bytes of the operand on each chip.
      times: how often it runs in a step.
      where: the operation of the model that it is from.
      computation: name of the computation that it is scheduled in.
      start: name of the instruction in it that is the collective, or begins it.
      end: name of the instruction that waits for its result; None where `start` does.
      hops: of a collective-permute, messages over the busiest direction of a link.
      dims: dimensions of links on which the compiler lays its rings, where it says so.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    given: float
    times: int
    where: str
    computation: str
    start: str
    end: str | None = None
    hops: int = 1
    dims: int | None = None

    @property
    def sent(self) -> float:
        """Bytes that a chip sends in one run."""
        return sent_bytes(self.kind, self.given, self.group)

    def seconds(self, chip: Chip) -> float:
        """Time of one run; a collective-permute uses one link.

        Others are over the dimensions of links that the compiler names, or over one for every mesh axis.
        """
        if not chip.link_bandwidth:
            return 0.0
        if self.kind == PERMUTE:
            return self.hops * self.given / chip.link_bandwidth
        if not chip.dims:  # a switch
            return self.sent / chip.link_bandwidth
        dims = min(self.dims or max(1, len(self.axes)), chip.dims)
        return link_bytes(self.kind, self.given, self.group, dims) / chip.link_bandwidth


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives of a step, those inside loops with the number of times that they run.

    Args:
      program: compiled for the mesh.
      mesh: size of every axis, in the order of the devices.

    Raises:
      UnreadableProgram: a loop of unknown length, or groups of an unknown form.
    """
    found = []
    for name, times in program.runs().items():
        own = program.computations[name]
        for number, one in enumerate(own):
            for kind, inner, results in _begun(one, own, program):
                end = _end(one, inner, own[number + 1 :], program)
                made = _collective(inner, kind, results, mesh)
                found.append(dataclasses.replace(made, times=times, computation=name, start=one.name, end=end))
    return [one for one in found if one.group > 1]


def _kind(opcode: str) -> str | None:
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _begun(one: Instruction, own: Computation, program: Program) -> list[tuple[str, Instruction, Mapping[str, str]]]:
    """Collectives that an instruction is, or begins: kind, instruction, and types of results beside it.

    A fusion can be a reduce-scatter, or begin a collective that later fusions continue; those do not count again.
    """
    kind = _kind(one.opcode)
    if kind is not None:
        return [(kind, one, {other.name: other.result for other in own})]
    if one.opcode not in ("fusion", "async-start"):
        return []
    called = str(one.called("calls"))
    inner = program.computations[called]
    targets = {target for line in inner for target in re.findall(r'custom_call_target="(\w+)"', line.attributes)}
    found, results = [], {line.name: line.result for line in inner}
    for line in inner:
        kind = _kind(line.opcode)
        if kind is None or _DONE in targets or ("chain_id" in line.attributes and _START not in targets):
            continue
        scatters = called.startswith(_SCATTER) and kind == "all-reduce"
        found.append(("reduce-scatter" if scatters else kind, line, results))
    return found


def _end(one: Instruction, inner: Instruction, later: Computation, program: Program) -> str | None:
    """The instruction that waits for what `one` begins; None where it does not return before the collective is done."""
    if one.opcode.endswith("-start"):
        begun = one.name
        for other in later:
            if begun in other.operands and other.opcode == "async-update":
                begun = other.name
            elif begun in other.operands and other.opcode.endswith("-done"):
                return other.name
        return None
    chain = re.search(r'chain_id="(\w+)"', inner.attributes)
    if one.opcode != "fusion" or chain is None:
        return None
    for other in later:
        lines = program.computations[str(other.called("calls"))] if other.opcode == "fusion" else ()
        if any(_DONE in line.attributes for line in lines) and any(chain[0] in line.attributes for line in lines):
            return other.name
    return None


def _collective(one: Instruction, kind: str, results: Mapping[str, str], mesh: Mapping[str, int]) -> Collective:
    given = sum((num_bytes(results[operand]) for operand in one.operands if operand in results), 0.0)
    count = math.prod(mesh.values())
    if kind == PERMUTE:
        pairs = device_pairs(one.attributes)
        axes = axes_of_pairs(pairs, mesh)
        rings = groups_of(mesh, axes) if axes else [tuple(range(count))]
        size, hops = (len(rings[0]), permuted_hops(pairs, rings)) if pairs else (1, 0)
    else:
        groups = device_groups(one.attributes, count)
        axes, size, hops = axes_of(groups, mesh), max(map(len, groups)), 1
    dims = re.search(r"NDRingStrategy\{.*?\bnum_dims:(\d+)", one.attributes)
    return Collective(kind, axes, size, given, 0, one.op_name, "", "", hops=hops, dims=int(dims[1]) if dims else None)

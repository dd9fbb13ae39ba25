"""Communication between chips in a compiled program: kinds, mesh axes, bytes, and what nothing hides."""

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from vlm_jax.costs.chips import Chip
from vlm_jax.planner.program_text import Instruction, Program, num_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_START, _DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
_SCATTER = "all-reduce-scatter"  # start of the name of a fusion that keeps a part of an all-reduce


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that moves bytes between chips.

    Attributes:
      kind: of `KINDS`.
      axes: mesh axes over which it is; empty where the groups are none of the mesh.
      group: chips that take part together.
      sent: bytes that a chip sends in one run, on a ring: the closed form of its kind for its operand.
      times: how often it runs in a step.
      hidden: whether computation runs between its start and its end.
      where: the operation of the model that it is from.
      computation: name of the one that it is scheduled in.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    sent: float
    times: int
    hidden: bool
    where: str
    computation: str

    def seconds(self, chip: Chip) -> float:
        """Time of all runs by a ring in both directions over one dimension of links for every mesh axis."""
        if self.group == 1 or not chip.link_bandwidth:
            return 0.0
        rings = chip.num_links // 2 if not chip.dims else min(max(1, len(self.axes)), chip.dims)
        return self.times * self.sent / (2 * rings * chip.link_bandwidth)


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives of a step, those inside loops with the number of times that they run.

    Args:
      program: compiled for the mesh.
      mesh: size of every axis, in the order of the devices.

    Raises:
      UnknownTripCount: a loop of unknown length.
    """
    found = []
    for name, own, times in program.schedule():
        results = {one.name: one.result for one in own}
        for one in own:
            kind = _kind(one.opcode)
            if kind is not None:
                hidden = one.opcode.endswith("-start")
                found.append(_collective(one, kind, results, mesh, times, name, hidden=hidden))
            elif one.opcode == "fusion":
                found += _in_fusion(one, program, mesh, times, name)
    return [one for one in found if one.group > 1]


def _kind(opcode: str) -> str | None:
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _in_fusion(
    fusion: Instruction, program: Program, mesh: Mapping[str, int], times: int, name: str
) -> list[Collective]:
    """Of a fusion that is a reduce-scatter, or starts a collective that later fusions continue."""
    called = str(fusion.called("calls"))
    inner = program.computations[called]
    targets = {target for one in inner for target in re.findall(r'custom_call_target="(\w+)"', one.attributes)}
    scatters = called.startswith(_SCATTER)
    found, results = [], {one.name: one.result for one in inner}
    for one in inner:
        kind = _kind(one.opcode)
        chained = "chain_id" in one.attributes
        if kind is None or _DONE in targets or (chained and _START not in targets):
            continue
        kind = "reduce-scatter" if scatters and kind == "all-reduce" else kind
        found.append(_collective(one, kind, results, mesh, times, name, hidden=_START in targets))
    return found


def _collective(
    one: Instruction,
    kind: str,
    results: Mapping[str, str],
    mesh: Mapping[str, int],
    times: int,
    name: str,
    *,
    hidden: bool,
) -> Collective:
    groups = device_groups(one.attributes, math.prod(mesh.values()))
    size = len(groups[0])
    given = sum((num_bytes(results[operand]) for operand in one.operands if operand in results), 0.0)
    sent = given if kind == "collective-permute" else sent_bytes(kind, given, size)
    hidden = hidden or '"async_collective_fusion_config":{"flag_start":"1' in one.attributes
    return Collective(kind, axes_of(groups, mesh), size, sent, times, hidden, one.op_name, name)


def sent_bytes(kind: str, given: float, size: int) -> float:
    """Bytes that each of `size` chips sends on a ring, for an operand of `given` bytes on each.

    Source: Thakur et al. 2005, sections 4.1 to 4.4; Chan et al. 2007, table 2.
    """
    if kind == "all-gather":
        return given * (size - 1)
    if kind == "all-reduce":
        return 2 * given * (size - 1) / size
    if kind == "collective-permute":
        return given
    return given * (size - 1) / size


def device_groups(attributes: str, num_devices: int) -> list[tuple[int, ...]]:
    """Groups of devices that an instruction's attributes name, in any of XLA's three forms.

    Args:
      attributes: with `replica_groups` or `source_target_pairs`.
      num_devices: of the mesh.
    """
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    if pairs is not None:
        return _connected([tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if named is not None:
        sizes = {key: int(size) for key, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        over = re.findall(r"'(\w+)'", named[2])
        return _of_axes(sizes, over, num_devices)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota is not None:
        order = np.arange(num_devices).reshape(tuple(map(int, iota[3].split(","))))
        order = order.transpose(tuple(map(int, iota[4].split(",")))) if iota[4] else order
        return [tuple(group) for group in order.reshape(int(iota[1]), int(iota[2])).tolist()]
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if listed is not None:
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    return [tuple(range(num_devices))]


def _of_axes(sizes: Mapping[str, int], over: Sequence[str], num_devices: int) -> list[tuple[int, ...]]:
    names = list(sizes)
    order = np.arange(num_devices).reshape([*sizes.values(), -1])
    kept = [index for index, name in enumerate(names) if name not in over]
    moved = [names.index(name) for name in over]
    count = math.prod(sizes[name] for name in over)
    order = order.transpose([*kept, len(names), *moved])
    return [tuple(group) for group in order.reshape(-1, count).tolist()]


def _connected(pairs: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Sets of devices that send to one another, directly or through others."""
    groups: dict[int, set[int]] = {}
    for source, target in pairs:
        joined = groups.get(source, {source}) | groups.get(target, {target})
        groups |= dict.fromkeys(joined, joined)
    return sorted({tuple(sorted(group)) for group in groups.values()})


def axes_of(groups: Sequence[tuple[int, ...]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which groups of devices lie; empty where there are none."""
    wide, count = [name for name, size in mesh.items() if size > 1], math.prod(mesh.values())
    wanted = {frozenset(group) for group in groups}
    for number in range(1, len(wide) + 1):
        for axes in itertools.combinations(wide, number):
            if wanted <= {frozenset(group) for group in _of_axes(mesh, axes, count)}:
                return axes
    return ()


def exposed_seconds(found: Sequence[Collective], compute: Mapping[str, float], chip: Chip) -> float:
    """Time of collectives that no computation hides.

    Those with a start and an end overlap with the computation that they are scheduled in, up to its time.

    Args:
      found: of the program.
      compute: seconds of computation in every scheduled computation, all its runs together.
      chip: whose links carry them.
    """
    exposed, hidden = 0.0, defaultdict[str, float](float)
    for one in found:
        if one.hidden:
            hidden[one.computation] += one.seconds(chip)
        else:
            exposed += one.seconds(chip)
    return exposed + sum(max(0.0, seconds - compute.get(name, 0.0)) for name, seconds in hidden.items())

"""Groups of devices that take part in a collective together, in all forms that XLA writes, and their mesh axes."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from vlm_jax.planner.program_text import UnreadableProgram

Group = tuple[int, ...]
_LIST = r"\{\d+(?:,\d+)*\}"
_SIDES = r"(\d+(?:,\d+)*)"
_ORDER = rf"\[{_SIDES}\](?:T\({_SIDES}\))?"
_MESH = rf"mesh\[('\w+'=\d+(?:, ?'\w+'=\d+)*)\](?:, device_ids=\({_ORDER}\))? \{{('\w+'(?:, ?'\w+')*)\}}"
_IOTA = rf"\[(\d+),(\d+)\]<={_ORDER}"
_LISTED = rf"\{{({_LIST}(?:, ?{_LIST})*)?\}}"
_END = r"(?=, \w+=|\s*$)"  # another attribute, or nothing


def device_groups(attributes: str, num_devices: int) -> list[Group]:
    """Groups of devices of an instruction's `replica_groups`: a list, ranges of devices, or axes of a mesh.

    Args:
      attributes: of the instruction; all devices are one group where it names none.
      num_devices: of the mesh.

    Raises:
      UnreadableProgram: another form.
    """
    start = re.search(r"\breplica_groups=", attributes)
    if start is None:
        return [tuple(range(num_devices))]
    given = attributes[start.end() :]
    mesh, iota, listed = (re.match(form + _END, given) for form in (_MESH, _IOTA, _LISTED))
    if mesh is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        over = re.findall(r"'(\w+)'", mesh[4])
        order = _ordered(mesh[2] or str(num_devices), mesh[3])
        if math.prod(sizes.values()) == num_devices == len(order) and set(over) <= set(sizes):
            return [tuple(order[place] for place in group) for group in groups_of(sizes, over)]
    elif iota is not None:
        order, count, size = _ordered(iota[3], iota[4]), int(iota[1]), int(iota[2])
        if len(order) == num_devices == count * size:
            return [tuple(order[start : start + size]) for start in range(0, num_devices, size)]
    elif listed is not None:
        return _listed(listed[1]) if listed[1] else [tuple(range(num_devices))]
    raise UnreadableProgram(f"unknown groups of {num_devices} devices: replica_groups={given[:120]}")


def _ordered(sides: str, axes: str | None) -> list[int]:
    """Devices counted along the sides, in the order of transposed axes; none where these are not the sides' axes."""
    shape = tuple(map(int, sides.split(",")))
    order = tuple(map(int, axes.split(","))) if axes else tuple(range(len(shape)))
    if sorted(order) != list(range(len(shape))):
        return []
    return np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1).tolist()


def device_pairs(attributes: str) -> list[tuple[int, int]]:
    """Sources and targets of a collective-permute, without devices that send to themselves.

    Raises:
      UnreadableProgram: `source_target_pairs` of another form.
    """
    found = re.search(rf"\bsource_target_pairs={_LISTED}{_END}", attributes)
    if found is None:
        raise UnreadableProgram(f"unknown pairs of devices: {attributes[:120]}")
    return [(pair[0], pair[1]) for pair in _listed(found[1] or "") if pair[0] != pair[1]]


def _listed(text: str) -> list[Group]:
    return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text)]


def groups_of(sizes: Mapping[str, int], over: Sequence[str]) -> list[Group]:
    """Groups along some axes of a mesh, whose devices are counted along the last axis first."""
    names = list(sizes)
    order = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    kept = [index for index, name in enumerate(names) if name not in over]
    order = order.transpose([*kept, *(names.index(name) for name in over)])
    return [tuple(group) for group in order.reshape(-1, math.prod(sizes[name] for name in over)).tolist()]


def axes_of(groups: Sequence[Group], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which groups of devices lie; empty where there are none."""
    wanted = {frozenset(group) for group in groups}
    for axes in _combinations(mesh):
        if wanted <= {frozenset(group) for group in groups_of(mesh, axes)}:
            return axes
    return ()


def axes_of_pairs(pairs: Sequence[tuple[int, int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The fewest mesh axes along which all pairs lie."""
    for axes in _combinations(mesh):
        place = {device: number for number, group in enumerate(groups_of(mesh, axes)) for device in group}
        if all(place[source] == place[target] for source, target in pairs):
            return axes
    return ()


def _combinations(mesh: Mapping[str, int]) -> list[tuple[str, ...]]:
    wide = [name for name, size in mesh.items() if size > 1]
    return [axes for number in range(1, len(wide) + 1) for axes in itertools.combinations(wide, number)]

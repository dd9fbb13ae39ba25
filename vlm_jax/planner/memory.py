"""Memory of a chip for a compiled program, and what fills it."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vlm_jax.planner.memory_traffic import FREE
from vlm_jax.planner.program_text import Program, arrays, num_bytes
from vlm_jax.types import Tree

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REPORTED = re.compile(r"Memory Space: default \(color=0\)\s+Total bytes: (\d+)")
_REFUSED = (
    r"HLO temporaries \(([\d.]+)([KMGT]?)i?B?\) exceeds available HBM \(([\d.]+)([KMGT]?)",
    r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm",
    r"Required: ([\d.]+)([KMGT]?)i?B?.*?[Aa]vailable: ([\d.]+)([KMGT]?)",
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip (of one device, where a chip is two).

    Attributes:
      arguments: parameters, optimizer state and batch; or parameters and cache.
      outputs: results that take no place of an argument.
      temporaries: activations and what else lives during the step. Of a program that does not fit it is what the
        compiler says that it needs.
      code: the program itself.
      peak: all of it.
      available: what a program may use, as the compiler says; of a program that fits, the memory of the chip.
      fits: whether the compiler accepts the program.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    peak: int
    available: int
    fits: bool

    @property
    def spare(self) -> int:
        """Bytes that are left; below 0 where the program does not fit."""
        return self.available - self.peak


@dataclasses.dataclass(frozen=True)
class Share:
    """One contributor: a group of arguments, or a temporary.

    Attributes:
      name: of the group; or the operation of the model.
      count: elements over all chips; of a temporary those on a chip.
      bytes: on a chip.
      shape: of a temporary, with its dtype; empty for a group.
    """

    name: str
    count: int
    bytes: int
    shape: str = ""


def of_compiled(compiled: jax.stages.Compiled, available: int, folder: pathlib.Path | None = None) -> Memory:
    """Memory of a program that fits.

    Args:
      compiled: the program.
      available: memory of the chip, in bytes.
      folder: where the TPU compiler wrote its report. Its total, of buffers as they were placed, is what it compares
        with the chip's memory; the temporaries of `Compiled.memory_analysis` alone, used where there is no report, are
        up to a third more.
    """
    stats: Any = compiled.memory_analysis()
    arguments, code = stats.argument_size_in_bytes, stats.generated_code_size_in_bytes
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = None if folder is None else _reported(folder)
    temporaries = stats.temp_size_in_bytes if total is None else total - arguments - outputs
    return Memory(arguments, outputs, temporaries, code, arguments + outputs + temporaries + code, available, True)


def _reported(folder: pathlib.Path) -> int | None:
    """Bytes in the main memory of the largest program that the compiler reported on."""
    totals = [_REPORTED.search(path.read_text()) for path in folder.glob("*memory-usage-report.txt")]
    return max((int(found[1]) for found in totals if found is not None), default=None)


def of_refusal(message: str, arguments: int) -> Memory | None:
    """Memory of a program that the compiler refused, from its message; None where it says something else.

    Args:
      message: of the error.
      arguments: bytes of the program's arguments on a chip.
    """
    for pattern in _REFUSED:
        found = re.search(pattern, message, re.DOTALL)
        if found is not None:
            peak = round(float(found[1]) * _UNITS[found[2]])  # with arguments, whatever the message calls it
            available = round(float(found[3]) * _UNITS[found[4]])
            return Memory(arguments, 0, peak - arguments, 0, peak, available, False)
    return None


def shard_bytes(leaf: Any) -> int:
    """Bytes of one device's part of an abstract array with a sharding; 0 for random keys."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        return 0
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def groups(arguments: Mapping[str, Tree]) -> list[Share]:
    """The groups of a program's arguments, the largest first."""
    found = []
    for name, tree in arguments.items():
        leaves = jax.tree.leaves(tree)
        if leaves:
            found.append(Share(name, sum(leaf.size for leaf in leaves), sum(map(shard_bytes, leaves))))
    return sorted(found, key=lambda one: -one.bytes)


def largest_temporaries(program: Program, most: int = 8) -> list[Share]:
    """The largest results of a step in the main memory, one for each operation of the model."""
    found: dict[str, Share] = {}
    for _, own, _ in program.schedule():
        for one in own:
            if one.opcode in FREE or one.is_root or not one.op_name:
                continue
            for dtype, shape, layout in arrays(one.result):
                size = int(num_bytes(f"{dtype}[{','.join(map(str, shape))}]{layout}", in_hbm=True))
                name = re.sub(r"^jit\(\w+\)/", "", one.op_name)
                if name not in found or found[name].bytes < size:
                    found[name] = Share(name, math.prod(shape), size, f"{dtype}{list(shape)}")
    return sorted(found.values(), key=lambda one: -one.bytes)[:most]

"""The text of a compiled program: its computations, how often each runs, and their instructions."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

# Bytes of an element; an element of fewer than eight bits is a fraction of a byte.
_FLOAT8 = ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
ITEM_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", *(f"f8{name}" for name in _FLOAT8)), 1.0),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2.0),
    **dict.fromkeys(("s32", "u32", "f32"), 4.0),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8.0),
    "c128": 16.0,
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 0.5),
    **dict.fromkeys(("s2", "u2"), 0.25),
    **dict.fromkeys(("s1", "u1"), 0.125),
    **dict.fromkeys(("token", "opaque"), 0.0),
}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9-]*)\(")
_ENDS = re.compile(r"\}(, execution_thread=\"[\w.\-]+\")?\s*$")  # a computation, of the core or of a SparseCore
_BEGINS = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = ")  # an instruction
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
UNKNOWN_CYCLES = 2**63 - 1


class UnreadableProgram(ValueError):
    """A program's text in a form that this package does not read; a number is not guessed."""


class UnknownTripCount(UnreadableProgram):
    """A loop whose number of iterations does not follow from the program's text."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: with its number.
      result: type of the result, as written, with layouts.
      opcode: as `fusion`.
      operands: names of the operands.
      attributes: the rest of the line.
      is_root: whether it is the computation's result.
      arguments: the operands as written; of a constant its value.
    """

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    arguments: str

    @property
    def op_name(self) -> str:
        """Where in the model it is from; empty where the compiler made it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return "" if found is None else found[1]

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None where there is none, or it is unknown."""
        found = _CYCLES.search(self.attributes)
        return None if found is None or int(found[1]) == UNKNOWN_CYCLES else int(found[1])

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return None if found is None else found[1]

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if listed is not None:
            return tuple(name.strip().lstrip("%") for name in listed[1].split(","))
        pair = (self.called("true_computation"), self.called("false_computation"))
        return tuple(name for name in pair if name is not None)


Computation = tuple[Instruction, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name.

    Attributes:
      computations: of the text.
      entry: name of the one that runs.
    """

    computations: Mapping[str, Computation]
    entry: str

    def schedule(self, name: str | None = None, times: int = 1) -> Iterator[tuple[str, Computation, int]]:
        """Computations whose instructions run one after another, each with the number of times that it runs.

        Computations of fusions are left out: a fusion is one instruction. Of the branches of a conditional, only the
        one with the most cycles is included.

        Args:
          name: the outermost one; the entry when None.
          times: how often it runs.

        Raises:
          UnknownTripCount: of a loop.
        """
        name = self.entry if name is None else name
        own = self.computations[name]
        yield name, own, times
        for instruction in own:
            inner = self.inner(instruction, own)
            if inner is not None:
                yield from self.schedule(inner[0], times * inner[1])

    def runs(self) -> dict[str, int]:
        """How often each computation of the schedule runs.

        Raises:
          UnknownTripCount: of a loop.
        """
        found = Counter[str]()
        for name, _, times in self.schedule():
            found[name] += times
        return dict(found)

    def inner(self, instruction: Instruction, around: Computation) -> tuple[str, int] | None:
        """The computation that a loop, a conditional or a call runs, and how often; None for other instructions.

        Raises:
          UnknownTripCount: of a loop.
        """
        if instruction.opcode == "while":
            return str(instruction.called("body")), self.trip_count(instruction, around)
        if instruction.opcode == "conditional":
            return max(instruction.branches, key=self._weight), 1
        if instruction.opcode == "call":
            return str(instruction.called("to_apply")), 1
        return None

    def trip_count(self, loop: Instruction, around: Computation) -> int:
        """Iterations of a loop that counts from a constant up to another one by a constant, as loops of `scan` do by 1.

        Raises:
          UnknownTripCount: any other loop.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known is not None:
            return int(known[1])
        condition = self.computations[str(loop.called("condition"))]
        own = {one.name: one for one in condition}
        root = next(one for one in condition if one.is_root)
        if root.opcode == "compare" and "direction=LT" in root.attributes:
            counter, limit = (own[name] for name in root.operands)
            index, stop = re.search(r"index=(\d+)", counter.attributes), _constant(limit, own)
            if counter.opcode == "get-tuple-element" and index is not None and stop is not None:
                start = _start(loop, int(index[1]), {one.name: one for one in around})
                step = self._step(str(loop.called("body")), int(index[1]))
                if start is not None and step is not None and step > 0:
                    return max(0, -((start - stop) // step))
        raise UnknownTripCount(
            f"the loop {loop.name} ({loop.op_name or 'made by the compiler'}) has an unknown number of iterations"
        )

    def _step(self, body: str, index: int) -> int | None:
        """The constant that an iteration adds to an element of the carry; None where it does something else."""
        own = {one.name: one for one in self.computations[body]}
        root = next(one for one in own.values() if one.is_root)
        if root.opcode != "tuple" or root.operands[index] not in own:
            return None
        added = _origin(own[root.operands[index]], own)
        if added.opcode != "add":
            return None
        terms = [_origin(own[name], own) for name in added.operands]
        counters = [one for one in terms if one.opcode == "get-tuple-element"]
        steps = [_constant(one, own) for one in terms if one.opcode == "constant"]
        counts = [f"index={index}" in re.split(r"[, ]+", one.attributes) for one in counters]
        return steps[0] if counts == [True] and len(steps) == 1 else None

    def _weight(self, name: str) -> int:
        return sum(one.cycles or 1 for one in self.computations[name])


def parse_program(text: str) -> Program:
    """The program of a text as of `jax.stages.Compiled.as_text`.

    Raises:
      UnreadableProgram: it has no entry computation, or a computation without a result.
    """
    found: dict[str, Computation] = {}
    entry, name, lines = "", None, list[str]()
    for line in text.splitlines():
        if name is None:
            start = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if start is not None:
                name, lines = start[2], []
                entry = name if start[1] else entry
        elif _ENDS.match(line):
            found[name], name = _computation(name, lines), None
        elif _BEGINS.match(line):
            lines.append(line)
        elif lines:  # attributes of kernels go on over several lines
            lines[-1] += line
    if not entry:
        raise UnreadableProgram("the text has no entry computation")
    return Program(found, entry)


def _computation(name: str, lines: list[str]) -> Computation:
    own = tuple(map(_instruction, lines))
    if sum(one.is_root for one in own) != 1:
        raise UnreadableProgram(f"the text of the computation {name} has no result")
    return own


def _instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    is_root = left.startswith("ROOT ")
    end = _closing(right, 0) if right.startswith("(") else right.index(" ")
    opcode = _OPCODE.match(right, end)
    assert opcode is not None, line
    start = opcode.end() - 1
    stop = _closing(right, start)
    arguments = right[start + 1 : stop - 1]
    names = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(
        left.removeprefix("ROOT ").lstrip("%"), right[:end], opcode[1], names, right[stop:], is_root, arguments
    )


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.end()
    raise ValueError(f"a parenthesis is not closed: {text[:200]}")


def _start(loop: Instruction, index: int, around: Mapping[str, Instruction]) -> int | None:
    """The constant that an element of a loop's first carry is."""
    given = around[loop.operands[0]]
    if given.opcode != "tuple" or given.operands[index] not in around:
        return None
    return _constant(around[given.operands[index]], around)


def _constant(one: Instruction, own: Mapping[str, Instruction]) -> int | None:
    """The integer that an instruction is, through copies."""
    one = _origin(one, own)
    return int(one.arguments) if one.opcode == "constant" and one.arguments.lstrip("-").isdigit() else None


def _origin(one: Instruction, own: Mapping[str, Instruction]) -> Instruction:
    """The instruction whose result copies pass on."""
    while one.opcode in ("copy", "bitcast", "copy-done", "copy-start") and one.operands and one.operands[0] in own:
        one = own[one.operands[0]]
    return one


def arrays(kind: str) -> list[tuple[str, tuple[int, ...], str]]:
    """The arrays of a type: dtype, shape and layout of each.

    Raises:
      UnreadableProgram: a dtype that is not in `ITEM_BYTES`.
    """
    found = []
    for dtype, sizes, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", kind)):
        if dtype not in ITEM_BYTES:
            raise UnreadableProgram(f"the program has arrays of the unknown dtype {dtype}")
        found.append((dtype, tuple(int(size) for size in sizes.split(",") if size), layout))
    return found


def num_bytes(kind: str, *, in_hbm: bool = False) -> float:
    """Bytes of a type, without padding.

    Args:
      kind: as written, of an array or a tuple.
      in_hbm: counts only arrays in the main memory, not those in memory space 1 and so on.
    """
    total = 0.0
    for dtype, shape, layout in arrays(kind):
        if not (in_hbm and re.search(r"S\([1-9]\)", layout)):
            total += ITEM_BYTES[dtype] * math.prod(shape)
    return total

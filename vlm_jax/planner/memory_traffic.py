"""Bytes that a compiled program reads and writes in the main memory of a chip."""

from collections.abc import Mapping

from vlm_jax.planner.program_text import Computation, Instruction, Program, num_bytes


def hbm_bytes(program: Program) -> float:
    """Bytes that a step reads and writes in the main memory.

    Slices of a stacked operand count as the slice, and updates in place as the update.

    Raises:
      UnknownTripCount: a loop of unknown length.
    """
    total = 0.0
    for _, own, times in program.schedule():
        results = {one.name: one.result for one in own}
        total += times * sum(moved(one, results, program) for one in own)
    return total


FREE = (
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"),
    *("copy-done", "all-gather-done", "all-reduce-done", "collective-permute-done", "async-done", "after-all"),
)


def moved(one: Instruction, results: Mapping[str, str], program: Program) -> float:
    """Bytes that one run of an instruction moves; arguments as of `hbm_bytes`, with the types of other results."""
    if one.opcode in FREE:
        return 0.0
    if one.opcode == "copy-start":  # between the memories; its result is the copy, the original and a flag
        return num_bytes(results.get(one.operands[0], ""))
    if one.opcode == "dynamic-slice":
        return 2 * num_bytes(one.result, in_hbm=True)
    if one.opcode == "dynamic-update-slice":
        return 2 * num_bytes(results.get(one.operands[1], ""), in_hbm=True)
    if one.opcode != "fusion":
        read = sum(num_bytes(results.get(name, ""), in_hbm=True) for name in one.operands)
        return num_bytes(one.result, in_hbm=True) + read
    return _moved_by_fusion(one, results, program.computations[str(one.called("calls"))])


def _moved_by_fusion(one: Instruction, results: Mapping[str, str], inner: Computation) -> float:
    total = 0.0
    own = {line.name: line for line in inner}
    for parameter in (line for line in inner if line.opcode == "parameter"):
        number = int(parameter.arguments)
        if number >= len(one.operands) or not num_bytes(results.get(one.operands[number], ""), in_hbm=True):
            continue
        users = [line for line in inner if parameter.name in line.operands]
        read = [line for line in users if line.operands[0] == parameter.name]
        if users == read and users and all(line.opcode in ("dynamic-slice", "gather") for line in users):
            total += sum(num_bytes(line.result) for line in users)
        elif users == read and users and all(line.opcode == "dynamic-update-slice" for line in users):
            total += sum(num_bytes(own[line.operands[1]].result) for line in users)
        else:
            total += num_bytes(parameter.result)
    root = next(line for line in inner if line.is_root)
    if root.opcode == "dynamic-update-slice":
        return total + num_bytes(own[root.operands[1]].result)
    return total + num_bytes(one.result, in_hbm=True)

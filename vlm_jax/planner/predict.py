"""The predicted time of a step: an estimate from the compiled program, never a measurement.

The TPU compiler writes an estimate of cycles on nearly every instruction. Their sum over the schedule, with the trip
counts of loops, divided by the clock, plus the time of attention kernels and of collectives that no computation hides,
is scaled by one constant, which is fitted to published steps (`calibration`).
"""

import dataclasses
from collections.abc import Sequence

from vlm_jax.costs.chips import Chip
from vlm_jax.planner.calibration import KERNEL_SHARE, SCALE, SPREAD
from vlm_jax.planner.collectives import Collective
from vlm_jax.planner.memory_traffic import FREE, moved
from vlm_jax.planner.overlap import exposed_seconds
from vlm_jax.planner.program_text import Program

KERNEL_TARGET = 'custom_call_target="tpu_custom_call"'  # a Pallas kernel, which has no estimate


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Predicted seconds of a step.

    Attributes:
      seconds: the middle of the range.
      low, high: the range, by the spread of the calibration; never below the products at the chip's peak.
      compute: seconds of all products at the chip's peak.
      memory: seconds of all reads and writes at the bandwidth of the main memory.
      instructions: seconds of the compiler's cycles.
      kernels: seconds of attention kernels.
      exposed: seconds of collectives that nothing hides.
      mfu: model FLOPs utilisation at `seconds`.
      without_cycles: share of `instructions` that is from bytes, where the compiler has no estimate.
    """

    seconds: float
    low: float
    high: float
    compute: float
    memory: float
    instructions: float
    kernels: float
    exposed: float
    mfu: float
    without_cycles: float


def estimate(
    program: Program,
    found: Sequence[Collective],
    chip: Chip,
    *,
    flops: float,
    kernel_flops: float,
    model_flops: float,
    traffic: float,
) -> Estimate:
    """The predicted time of a compiled program.

    Args:
      program: its text.
      found: its collectives.
      chip: that it is for, with a known clock.
      flops: of a chip, those of kernels included, for the pairs of attention that masks leave.
      kernel_flops: of a chip in attention kernels, for the same pairs.
      model_flops: of a chip, without those of rematerialisation, and with all pairs of attention.
      traffic: bytes of a chip's main memory.

    Raises:
      UnreadableProgram: a loop of unknown length, or another unknown form.
    """
    assert chip.clock is not None
    communicates = {(one.computation, end) for one in found for end in (one.start, one.end)}
    work, total, guessed = dict[tuple[str, str], float](), 0.0, 0.0
    for name, times in program.runs().items():
        own = program.computations[name]
        results = {one.name: one.result for one in own}
        for one in own:
            key = name, one.name
            if key in communicates:
                continue
            if one.cycles is not None:
                work[key] = one.cycles / chip.clock
            elif _takes_time(one.opcode) and KERNEL_TARGET not in one.attributes:
                work[key] = moved(one, results, program) / chip.hbm_bandwidth
                guessed += times * work[key]
            total += times * work.get(key, 0.0)
    kernels = kernel_flops / (KERNEL_SHARE * chip.flops)
    exposed = exposed_seconds(program, found, work, chip)
    compute = flops / chip.flops
    middle = max(compute, SCALE * (total + kernels + exposed))
    return Estimate(
        seconds=middle,
        low=max(compute, middle / (1 + SPREAD)),
        high=middle * (1 + SPREAD),
        compute=compute,
        memory=traffic / chip.hbm_bandwidth,
        instructions=total,
        kernels=kernels,
        exposed=exposed,
        mfu=model_flops / (middle * chip.flops),
        without_cycles=guessed / total if total else 0.0,
    )


def _takes_time(opcode: str) -> bool:
    """Whether the core is busy with an instruction; it is not with bookkeeping, collectives and asynchronous copies."""
    moves = ("all-", "collective-", "reduce-scatter", "copy-start", "async-", "send", "recv")
    return opcode not in FREE and not opcode.startswith(moves)

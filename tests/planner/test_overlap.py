"""Communication that work hides, in programs whose every second is given."""

import pytest

from vlm_jax.costs.chips import chip_of
from vlm_jax.planner.collectives import collectives
from vlm_jax.planner.overlap import exposed_seconds
from vlm_jax.planner.program_text import parse_program

CHIP = chip_of("TPU v5 lite")
SECOND = int(CHIP.link_bandwidth)  # bytes that a link carries in one direction


def program_of(*lines):
    shape = f"u8[{SECOND}]" + "{0}"
    *first, last = (f"%{line}" for line in lines)
    done = "\n".join(f"  {line}" for line in (*first, f"ROOT {last}")).replace("SHAPE", shape)
    pairs = "{{0,1},{1,2},{2,3},{3,0},{4,4}}"
    return parse_program(
        f"ENTRY %main (a: u8[8]) -> u8[8] {{\n  %a = {shape} parameter(0)\n"
        + done.replace("PAIRS", f"source_target_pairs={pairs}, channel_id=1")
        + "\n}\n"
    )


def exposed(program, **work):
    found = collectives(program, {"context": 8})
    given = {("main", name): float(seconds) for name, seconds in work.items()}
    return exposed_seconds(program, found, given, CHIP)


START = "s{n} = (SHAPE, SHAPE) collective-permute-start(%a), PAIRS"
DONE = "d{n} = SHAPE collective-permute-done(%s{n})"


def line(form, number):
    return form.replace("{n}", str(number))


def test_only_work_between_start_and_end_hides():
    """A shift of a second: nothing of it is hidden by work before its start or after its end."""
    work = "w{n} = SHAPE add(%a, %a)"
    program = program_of(line(work, 0), line(START, 0), line(work, 1), line(DONE, 0), line(work, 2))
    (one,) = collectives(program, {"context": 8})
    assert (one.axes, one.hops, one.end, one.seconds(CHIP)) == (("context",), 1, "d0", 1.0)
    assert exposed(program, w0=5, w2=5) == pytest.approx(1)
    assert exposed(program, w0=5, w1=0.25, w2=5) == pytest.approx(0.75)
    assert exposed(program, w1=3) == 0


def test_work_hides_one_collective_at_a_time():
    work = "w{n} = SHAPE add(%a, %a)"
    program = program_of(line(START, 0), line(START, 1), line(work, 0), line(DONE, 0), line(work, 1), line(DONE, 1))
    assert exposed(program, w0=1.5, w1=0.2) == pytest.approx(0.3)
    assert exposed(program, w0=0.4) == pytest.approx(0.6 + 1)


def test_what_returns_when_it_is_done_is_exposed():
    program = program_of("p = SHAPE collective-permute(%a), PAIRS", "w0 = SHAPE add(%a, %a)")
    assert exposed(program, w0=9) == pytest.approx(1)

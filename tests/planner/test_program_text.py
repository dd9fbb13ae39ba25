"""Loops, sizes and traffic of compiled programs: small texts, and programs that XLA compiles here for CPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlm_jax.planner.collectives import collectives
from vlm_jax.planner.memory_traffic import hbm_bytes
from vlm_jax.planner.program_text import UnknownTripCount, UnreadableProgram, num_bytes, parse_program

TEXT = """HloModule jit_step, is_scheduled=true

%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

%sliced (x: f32[5,8], i: s32[]) -> f32[1,8] {
  %x = f32[5,8]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  ROOT %slice = f32[1,8]{1,0:T(1,128)} dynamic-slice(%x, %i), dynamic_slice_sizes={1,8}
}

%body (p: (s32[], f32[5,8])) -> (s32[], f32[5,8]) {
  %p.1 = (s32[]{:T(128)}, f32[5,8]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x.1 = f32[5,8]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %fused = f32[1,8]{1,0:T(1,128)S(1)} fusion(%x.1, %i.1), calls=%sliced, backend_config={"estimated_cycles":"100"}
  %one = s32[]{:T(128)} constant(1)
  %copied = s32[]{:T(128)S(6)} copy(%i.1)
  %next = s32[]{:T(128)S(6)} add(%copied, %one)
  ROOT %t = (s32[]{:T(128)}, f32[5,8]{1,0:T(8,128)}) tuple(%next, %x.1)
}

ENTRY %main (a: f32[5,8]) -> f32[5,8] {
  %a = f32[5,8]{1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)} constant(FROM)
  %first = s32[]{:T(128)} copy(%start)
  %made = (s32[]{:T(128)}, f32[5,8]{1,0:T(8,128)}) tuple(%first, %a)
  %loop = (s32[], f32[5,8]{1,0:T(8,128)}) while(%made), condition=%condition, body=%body, op_name="layers/while"
  ROOT %out = f32[5,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_runs_from_its_first_count_to_its_limit():
    program = parse_program(TEXT.replace("FROM", "2"))
    assert {name: times for name, _, times in program.schedule()} == {"main": 1, "body": 3}
    (fusion,) = (one for one in program.computations["body"] if one.opcode == "fusion")
    assert fusion.cycles == 100


@pytest.mark.parametrize(("step", "start", "times"), [(2, 0, 3), (2, 1, 2), (5, 0, 1), (7, 4, 1), (2, 5, 0)])
def test_a_loop_counts_by_a_constant(step, start, times):
    """As products whose gather of one operand the compiler divides, two parts an iteration, do."""
    text = TEXT.replace("FROM", str(start)).replace("constant(1)", f"constant({step})")
    assert len(range(start, 5, step)) == times
    assert [runs for name, _, runs in parse_program(text).schedule() if name == "body"] == [times]


def test_a_loop_of_unknown_length_is_refused():
    given = TEXT.replace("%start = s32[]{:T(128)} constant(FROM)", "%start = s32[]{:T(128)} add(%a, %a)")
    with pytest.raises(UnknownTripCount, match=r"layers/while"):
        list(parse_program(given).schedule())
    with pytest.raises(UnknownTripCount):
        list(parse_program(TEXT.replace("FROM", "2").replace("direction=LT", "direction=NE")).schedule())


@pytest.mark.parametrize(
    ("given", "other"),
    [("constant(1)", "constant(0)"), (" add(", " subtract("), ("(%next, %x.1)", "(%i.1, %x.1)")],
    ids=["by nothing", "down", "not at all"],
)
def test_a_loop_that_does_not_count_up_is_refused(given, other):
    text = TEXT.replace("FROM", "0")
    assert given in text and parse_program(text).runs() == {"main": 1, "body": 5}
    with pytest.raises(UnknownTripCount, match=r"layers/while"):
        parse_program(text.replace(given, other)).runs()


def test_an_unknown_dtype_is_refused():
    assert num_bytes("(f8e4m3[2,3]{1,0}, f4e2m1fn[8]{0}, token[], pred[])") == 6 + 4 + 0 + 1
    with pytest.raises(UnreadableProgram, match="unknown dtype f6e3m2fn"):
        num_bytes("f6e3m2fn[8]{0}")


def test_a_slice_of_a_stack_reads_the_slice_and_another_memory_is_free():
    copied, sliced = 4 + 4, 8 * 4 + 4  # the count to its copy; a row of the stack and its index
    counted = 4 + 4  # in another memory: only the count that is read, and the constant
    assert hbm_bytes(parse_program(TEXT.replace("FROM", "0"))) == copied + 5 * (sliced + counted)
    assert num_bytes("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0:T(256)S(1)})") == 32
    assert num_bytes("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0:T(256)S(1)})", in_hbm=True) == 24


def test_a_sharded_scan_has_the_collectives_of_its_closed_form():
    """FSDP: every layer's kernel is gathered, and its gradient is summed over all devices."""
    sizes, width, depth, rows = {"data": 2, "fsdp": 4}, 16, 3, 8
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (jax.sharding.AxisType.Auto,) * 2)
    layers = jax.ShapeDtypeStruct((depth, width, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))

    def loss(layers, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0].sum()

    compiled = jax.jit(jax.grad(loss), out_shardings=NamedSharding(mesh, PartitionSpec())).lower(layers, x).compile()
    found = collectives(parse_program(compiled.as_text()), sizes)
    gradients = [one for one in found if one.sent * one.times > 1000]
    assert {one.axes for one in gradients} == {("data", "fsdp")}
    total = sum(one.sent * one.times for one in gradients)
    assert total == pytest.approx(2 * depth * width * width * 4 * 7 / 8)

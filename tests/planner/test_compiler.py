"""Both texts of a compiled program, and programs that libtpu cannot print."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.planner.collectives import collectives
from vlm_jax.planner.compiler import compiled_for, text_of
from vlm_jax.planner.memory import of_compiled, of_refusal
from vlm_jax.planner.predict import KERNEL_TARGET
from vlm_jax.planner.program_text import UnreadableProgram, parse_program
from vlm_jax.planner.topology import open_topology
from vlm_jax.train.step import TPU_OPTIONS

GIB = 2**30
MESH = {"data": 1, "fsdp": 4, "tensor": 1, "context": 1, "expert": 1}


def test_both_texts_have_the_same_collectives_and_cycles(texts):
    printed, written = map(parse_program, texts)
    assert collectives(printed, MESH) == collectives(written, MESH) != []
    assert printed.runs() == written.runs()
    cycles = [
        {one.name: one.cycles for name in program.runs() for one in program.computations[name] if one.cycles}
        for program in (printed, written)
    ]
    assert cycles[0] == cycles[1] and sum(cycles[0].values()) > 0


def test_a_program_that_cannot_be_printed_is_read_from_the_compilers_files(monkeypatch, tmp_path):
    def fails(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure about async-update\nmore")

    compiled = jax.jit(lambda: 1).lower().compile()
    monkeypatch.setattr(jax.stages.Compiled, "as_text", fails)
    with pytest.raises(UnreadableProgram, match=r"about async-update\), and the compiler wrote no text"):
        text_of(compiled, tmp_path)
    (tmp_path / "module_0000.jit_step.after_codegen.txt").write_text("HloModule jit_step")
    assert text_of(compiled, tmp_path) == "HloModule jit_step"


@pytest.mark.parametrize(("sides", "names", "over", "dims"), [((16,), "a", "a", 2), ((4, 4), "ab", "b", 1)])
def test_an_all_reduce_uses_the_dimensions_of_links_that_the_compiler_lays_its_rings_on(
    tmp_path, sides, names, over, dims
):
    """Of all chips of a torus both, by one axis of the mesh; of a row of it one."""
    topology = open_topology("v5e:4x4")
    mesh = jax.make_mesh(sides, tuple(names), (jax.sharding.AxisType.Auto,) * len(sides), devices=topology.devices)
    kept = P(tuple(name for name in names if name != over))
    summed = jax.shard_map(lambda x: jax.lax.psum(x, over), mesh=mesh, in_specs=P(tuple(names)), out_specs=kept)
    given = jax.ShapeDtypeStruct((16, 1 << 20), jnp.float32, sharding=NamedSharding(mesh, P(tuple(names))))
    compiled = compiled_for(mesh, jax.jit(summed).trace(given), tmp_path)
    (found,) = collectives(parse_program(compiled.as_text()), dict(zip(names, sides, strict=True)))
    size = 16 if dims == 2 else 4
    assert (found.kind, found.axes, found.group) == ("all-reduce", tuple(over), size)
    seconds = 2 * (size - 1) / size * (4 << 20) / (2 * dims) / topology.chip.link_bandwidth
    assert found.seconds(topology.chip) == pytest.approx(seconds)


@pytest.mark.parametrize("options", [None, TPU_OPTIONS])
def test_a_training_step_gathers_kernels_whole(tmp_path, options):
    """By itself the compiler divides their products, and passes parts of kernels on from device to device."""
    topology = open_topology("v5e:4x4")
    mesh = jax.make_mesh((16,), ("fsdp",), (jax.sharding.AxisType.Auto,), devices=topology.devices)
    kernel, x = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
        for shape in ((2048, 8192), (16 * 4096, 2048))
    )
    jitted = jax.jit(jnp.dot, compiler_options=options, out_shardings=x.sharding)
    text = text_of(compiled_for(mesh, jitted.trace(x, kernel), tmp_path), tmp_path)
    found = {one.kind for one in collectives(parse_program(text), {"fsdp": 16})}
    assert found == ({"collective-permute"} if options is None else {"all-gather"})


def test_a_kernel_whose_attributes_take_several_lines_is_one_instruction(tmp_path):
    """As those of splash; what comes after it in its computation is read too."""

    def doubled(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    device = open_topology("v5e:2x2").devices[0]
    mesh = jax.sharding.Mesh([device], "a")
    given = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, P()))

    def run(x):
        kernel = pl.pallas_call(doubled, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), metadata={"xprof": "{}"})
        return jax.lax.scan(lambda x, _: (kernel(x) @ jnp.ones((128, 128)), None), x, length=7)[0]

    text = compiled_for(mesh, jax.jit(run).trace(given), tmp_path).as_text()
    assert "kernel_metadata={\n" in text
    program = parse_program(text)
    (loop,) = (name for name, times in program.runs().items() if times == 7)
    found = [one for one in program.computations[loop] if KERNEL_TARGET in one.attributes]
    assert len(found) == 1 and found[0].op_name.endswith("pallas_call")
    assert program.computations[loop][-1].is_root


def test_memory_is_what_the_compiler_compares_with_the_chip(tmp_path):
    """One step of more rows does not fit; the difference is the rows' own activations, and the rest is alike."""
    topology = open_topology("v5e:2x2")
    mesh = jax.sharding.Mesh([topology.devices[0]], "a")
    whole = NamedSharding(mesh, P())
    layers, width, block = 16, 2048, 8192

    def gradients(kernels, x):
        def layer(x, kernel):
            return jax.checkpoint(lambda kernel, x: jnp.tanh(x @ kernel) @ kernel.T)(kernel, x), None

        return jax.grad(lambda kernels: jnp.sum(jnp.float32(jax.lax.scan(layer, x, kernels)[0]) ** 2))(kernels)

    def planned(name, rows):
        given = [
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole)
            for shape in ((layers, width, width), (rows, width))
        ]
        folder = tmp_path / name
        return of_compiled(compiled_for(mesh, jax.jit(gradients).trace(*given), folder, quick=True), 16 * GIB, folder)

    fits = planned("fits", 24 * block)
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        planned("refused", 25 * block)
    larger = of_refusal(str(refused.value), 0)
    assert larger is not None and larger.available == int(15.75 * GIB)
    assert fits.peak - fits.code <= larger.available < larger.peak
    # A block of rows is kept for every layer, and in the four arrays that its gradient holds at once.
    assert larger.peak - (fits.peak - fits.code) == pytest.approx((layers + 4) * block * width * 2, rel=0.05)


def test_a_computation_without_a_result_is_refused():
    text = "ENTRY %main (a: f32[8]) -> f32[8] {\n  ROOT %a = f32[8]{0} parameter(0)\n}"
    assert parse_program(text).runs() == {"main": 1}
    aside = '%sum (b: s32[]) -> s32[] {\n  ROOT %b = s32[] parameter(0)\n}, execution_thread="sparsecore"\n\n'
    assert parse_program(aside + text).computations.keys() == {"sum", "main"}
    with pytest.raises(UnreadableProgram, match="the computation main has no result"):
        parse_program(text.replace("ROOT ", ""))

"""Both texts of a compiled program, and programs that libtpu cannot print."""

import jax
import pytest

from vlm_jax.planner.collectives import collectives
from vlm_jax.planner.compiler import text_of
from vlm_jax.planner.program_text import UnreadableProgram, parse_program

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

"""Compiles for devices that this machine does not have, and reads the text of what the compiler makes."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from vlm_jax.planner.program_text import UnreadableProgram
from vlm_jax.sharding.rules import use_mesh

# Compiles in about half the time; memory is within 2%, and times mean nothing.
QUICK: Any = {"exec_time_optimization_effort": -1.0}
_DUMPED = "*.after_codegen.txt"


def compiled_for(
    mesh: Mesh, traced: jax.stages.Traced, folder: pathlib.Path, *, quick: bool = False
) -> jax.stages.Compiled:
    """The program for a mesh.

    Args:
      mesh: of absent devices.
      traced: the step.
      folder: where the compiler writes the program's text and a report of its memory.
      quick: for a program of which only the memory is read.

    Raises:
      jax.errors.JaxRuntimeError: it does not compile, or does not fit.
    """
    options: dict[str, Any] = {"xla_dump_to": str(folder), **(QUICK if quick else {})}
    with use_mesh(mesh), _without_cache():
        return traced.lower().compile(compiler_options=dict(options))


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Compiles anew: JAX writes programs for absent devices to its cache, and cannot read them."""
    config: Any = jax.config  # whose flags have no types
    before = config.jax_enable_compilation_cache
    compilation_cache.reset_cache()
    config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        compilation_cache.reset_cache()
        config.update("jax_enable_compilation_cache", before)


def text_of(compiled: jax.stages.Compiled, folder: pathlib.Path) -> str:
    """The text of a program; libtpu cannot print some large ones, whose text is what the compiler wrote on its way.

    Args:
      compiled: by `compiled_for`.
      folder: the same.

    Raises:
      UnreadableProgram: there is neither.
    """
    try:
        text: Any = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        try:
            return dumped_text(folder)
        except UnreadableProgram as missing:
            reason = str(error).splitlines()[0]
            raise UnreadableProgram(f"libtpu cannot print this program ({reason}), and {missing}") from error
    return text


def dumped_text(folder: pathlib.Path) -> str:
    """The text that the compiler wrote after it generated code.

    Raises:
      UnreadableProgram: there is none.
    """
    files = sorted(folder.glob(_DUMPED), key=lambda path: path.stat().st_size)
    if not files:
        raise UnreadableProgram("the compiler wrote no text after code generation")
    return files[-1].read_text(encoding="utf-8", errors="replace")

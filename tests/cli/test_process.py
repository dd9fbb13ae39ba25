"""The output of a command."""

import io
import sys
import types

from vlm_jax.cli.process import _without_closed_loops, escape_unprintable


def test_a_character_that_the_output_cannot_have_is_escaped(monkeypatch):
    """As where LANG or PYTHONIOENCODING names an encoding without it."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    escape_unprintable()
    print("caf\u00e9 \u732b", flush=True)
    assert written.getvalue() == b"caf\xe9 \\u732b\n"


def test_writes_that_end_after_a_failed_save_are_not_told():
    told = []
    show = _without_closed_loops(told.append)
    others = [types.SimpleNamespace(exc_value=error) for error in (RuntimeError("another"), ValueError("loop"))]
    for args in [types.SimpleNamespace(exc_value=RuntimeError("Event loop is closed")), *others]:
        show(args)
    assert told == others

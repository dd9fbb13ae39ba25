"""The output of a command."""

import io
import sys

from vlm_jax.cli.process import escape_unprintable


def test_a_character_that_the_output_cannot_have_is_escaped(monkeypatch):
    """As where LANG or PYTHONIOENCODING names an encoding without it."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    escape_unprintable()
    print("caf\u00e9 \u732b", flush=True)
    assert written.getvalue() == b"caf\xe9 \\u732b\n"

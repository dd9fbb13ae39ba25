"""Reads the `Attributes:` of Google style docstrings, for pages that are tables of settings."""

import inspect
import re
from typing import Any

HEADS = re.compile(r"^(Args|Arguments|Attributes|Raises|Returns|Yields|Source|Example|Examples|Note):")


def summary(cls: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def escaped(text: str) -> str:
    """Text for a cell of a table: on one line, with characters of Markdown outside of code as they are."""
    parts = " ".join(text.split()).split("`")
    outside = [part.replace("*", "\\*").replace("<", "&lt;").replace("|", "\\|") for part in parts[::2]]
    parts[::2] = outside
    return "`".join(parts)


def attributes(cls: Any) -> dict[str, str]:
    """What a class and its bases say of each field; `a, b: text` is about both."""
    found = dict[str, str]()
    for one in reversed(cls.__mro__):
        if "__doc__" in vars(one) and one.__doc__:
            found |= _section(inspect.cleandoc(one.__doc__))
    return found


def _section(doc: str) -> dict[str, str]:
    """The entries of `Attributes:`; deeper lines continue the one before."""
    found, names, inside = dict[str, str](), list[str](), False
    for line in doc.splitlines():
        if HEADS.match(line):
            inside, names = line.startswith("Attributes:"), []
        elif inside and line and not line.startswith(" "):
            inside = False
        elif inside and (entry := re.match(r"^  ([A-Za-z_][\w, ]*): (.*)", line)):
            names = [name.strip() for name in entry[1].split(",")]
            found |= dict.fromkeys(names, entry[2].strip())
        elif inside and line.strip():
            for name in names:
                found[name] += " " + line.strip()
    return found

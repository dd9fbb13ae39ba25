"""The page of the commands' flags, from the modules that define them."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from docstrings import escaped

CLI = Path(__file__).resolve().parents[1] / "vlm_jax" / "cli"
SHARED = {"command": "Runs of a config", "executors": "Where points are run", "process": "Every command"}
HEAD = """# Commands

Every command is a module, `python -m vlm_jax.cli.NAME`; `--help` prints its flags. A fault of the input is one message
with exit status 1. This page is made from the modules.
"""


def commands() -> list[str]:
    """Names of the modules that are commands, in alphabetical order."""
    return sorted(path.stem for path in CLI.glob("*.py") if '__name__ == "__main__"' in path.read_text())


def flags_of(name: str) -> tuple[ModuleType, dict[str, Any]]:
    """A module of the command line, and its own flags by name; commands may use the same names, so none stays."""
    registered = flags.FLAGS._flags()
    held = dict(registered)
    registered.clear()
    try:
        module = importlib.import_module(f"vlm_jax.cli.{name}")
        registered.clear()
        module = importlib.reload(module)  # defines its own flags alone
        own = {one.name for one in vars(module).values() if isinstance(one, flags.FlagHolder)}
        return module, {flag: registered[flag] for flag in sorted(own)}
    finally:
        registered.clear()
        registered.update(held)


def accepted(name: str) -> set[str]:
    """Names of all flags that a command takes, without `config.KEY`."""
    module, own = flags_of(name)
    shared = [other for other in SHARED if other == "process" or other in vars(module)]
    return {*own, *(flag for other in shared for flag in flags_of(other)[1])}


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for name in commands():
        module, own = flags_of(name)
        parts.append(f"\n## {name}\n")
        usage, _, more = (module.__doc__ or "").strip().partition("\n\n")
        parts.append(f"```text\n{usage}\n```\n\n{more}\n")
        parts += list(_table(own))
        shared = [title for other, title in SHARED.items() if other in vars(module)]
        if shared:
            links = " and ".join(f"[{title}](#{title.lower().replace(' ', '-')})" for title in shared)
            parts.append(f"\nand those of {links}.\n")
    for name, title in SHARED.items():
        parts.append(f"\n## {title}\n")
        parts += list(_table(flags_of(name)[1]))
    return "\n".join(parts)


def _table(own: dict[str, Any]) -> Iterator[str]:
    yield "| flag | takes | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, flag in own.items():
        takes, meaning = getattr(flag.parser, "syntactic_help", "") or flag.flag_type(), flag.help
        if isinstance(flag, flags.EnumFlag):  # absl writes the values before the meaning, as <a|b|c>:
            takes, meaning = ", ".join(flag.parser.enum_values), meaning.partition(">: ")[2]
        elif isinstance(flag, flags.MultiFlag):
            takes, meaning = "repeatable", meaning.partition(";\n")[0]
        value = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
        default = "" if value in (None, "") else f"`{value}`"
        yield f"| `--{name}` | {escaped(takes)} | {default} | {escaped(meaning)} |"

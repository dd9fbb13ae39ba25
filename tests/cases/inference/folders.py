"""Tiny released folders without torch: a language model of `tests/processes/alphabet.py`, and golden folders."""

import json
import pathlib
import shutil
from typing import Any

from tests.golden.conftest import DATA
from tests.processes import alphabet


def alphabet_folder(path: pathlib.Path) -> pathlib.Path:
    """A text-only Llama that outputs the alphabet."""
    path.mkdir(parents=True, exist_ok=True)
    alphabet.write(path)
    return path


def golden_folder(name: str, path: pathlib.Path) -> pathlib.Path:
    """A copy of a golden folder."""
    shutil.copytree(DATA / name, path)
    return path


def edit(path: pathlib.Path, name: str, keys: tuple[str, ...], value: Any) -> None:
    """Sets one value of a JSON file, under nested keys; the file is made if there is none."""
    file = path / name
    whole = json.loads(file.read_text()) if file.exists() else {}
    section = whole
    for key in keys[:-1]:
        section = section.setdefault(key, {})
    section[keys[-1]] = value
    file.write_text(json.dumps(whole))

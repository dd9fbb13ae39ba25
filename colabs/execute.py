"""python colabs/execute.py [--short] [NAME …]: runs notebooks, and writes them with outputs to build/notebooks.

Tests and the pages of the documentation run the short form, which changes some numbers of a notebook; each change is a
line of `SHORT`. The pages show the notebooks that are in build/notebooks, where their sources are those of today.
"""

import argparse
import os
import pathlib
import sys
from typing import Any

import nbclient
import nbformat

COLABS = pathlib.Path(__file__).resolve().parent
ROOT = COLABS.parent
EXECUTED = ROOT / "build" / "notebooks"
TIMEOUT = 1800
_FEW_STEPS = """STEPS = {}
config = digits_token_budget.get_config("small")
from configs import digits_stages
with config.unlocked():
    digits_stages.shrink(config.base.stages)
    config.base.data.evaluation_size = 4"""
# What the short form writes in place of a notebook's own text.
SHORT = {
    "token_budget": {'config = digits_token_budget.get_config("small")': _FEW_STEPS},
    "ask_a_release": {},
    "fine_tune": {"EPOCHS = 12": "EPOCHS = 8"},
    "reduce_a_release": {
        'REDUCERS = "none,random,visionzip,divprune"': 'REDUCERS = "none,random,visionzip"',
        'BUDGETS = "48,32,16"': 'BUDGETS = "32,16"',
        "KEPT = (32, 16)": "KEPT = (16,)",
        "count=64": "count=32",
    },
    "look_inside": {},
    "plan_a_pod": {
        'RELEASE = "llava-hf/llava-1.5-7b-hf"': "from vlm_jax.train.small_release import hub_or_small\n\n"
        'RELEASE = hub_or_small("llava-hf/llava-1.5-7b-hf")',
        '"v5e:4x4"': '"v5e:2x2"',
        "LENGTH = 1024": "LENGTH = 128",
        "BUDGETS = (256, 64, 16)": "BUDGETS = (32, 8)",
        "TEXT = 256": "TEXT = 64",
    },
}


def read(name: str, *, short: bool) -> Any:
    """A notebook of this folder, for `nbclient`.

    Args:
      name: of the file, without `.ipynb`.
      short: with the changes of `SHORT`.

    Raises:
      ValueError: a text that the short form replaces is not in the notebook once.
    """
    notebook = nbformat.read(COLABS / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for old, text in SHORT[name].items() if short else ():
        holders = [cell for cell in cells if old in cell.source]
        if len(holders) != 1 or holders[0].source.count(old) != 1:
            raise ValueError(f"colabs/{name}.ipynb: expected '{old}' once; change SHORT in colabs/execute.py")
        holders[0].source = holders[0].source.replace(old, text)
    return notebook


def executed(name: str, *, short: bool, folder: pathlib.Path = COLABS) -> Any:
    """A notebook with its outputs, run in a folder on the CPU, without a model hub and without an installation.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = read(name, short=short)
    sources = {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            sources[number] = cell.source
            cell.source = "\n".join("" if line.startswith("%pip") else line for line in cell.source.splitlines())
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    client = nbclient.NotebookClient(notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(folder)}})
    client.execute(env=env)
    for number, source in sources.items():
        notebook.cells[number].source = source
    return notebook


def sources(notebook: Any) -> list[str]:
    """The source of every cell."""
    return [cell.source for cell in notebook.cells]


def kept(name: str) -> Any:
    """The notebook with outputs in build/notebooks, run now in its short form unless it is of today's sources."""
    path = EXECUTED / f"{name}.ipynb"
    if path.exists():
        found = nbformat.read(path, as_version=4)
        if any(sources(found) == sources(read(name, short=short)) for short in (False, True)):
            return found
    return write(name, short=True)


def write(name: str, *, short: bool) -> Any:
    """Runs a notebook, writes it to build/notebooks and returns it."""
    notebook = executed(name, short=short)
    EXECUTED.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, EXECUTED / f"{name}.ipynb")
    return notebook


def main() -> None:
    """Runs the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="run the form of the tests")
    parser.add_argument("names", nargs="*", default=list(SHORT), metavar="NAME")
    given = parser.parse_args()
    for name in given.names:
        print(name, file=sys.stderr)
        write(name, short=given.short)


if __name__ == "__main__":
    main()

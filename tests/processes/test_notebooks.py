"""Every notebook runs top to bottom, and defines nothing."""

import ast
import pathlib

import nbclient
import nbformat
import pytest

COLABS = pathlib.Path(__file__).resolve().parents[2] / "colabs"
NOTEBOOKS = sorted(COLABS.glob("*.ipynb"))


def sources(notebook) -> list[str]:
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return ["\n".join(line for line in source.splitlines() if not line.startswith("%")) for source in cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_defines_nothing(path):
    for source in sources(nbformat.read(path, as_version=4)):
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda), source


def shrunk(notebook) -> None:
    """Takes a few steps of each stage and asks a few questions, in place; the points stay those of the notebook."""
    (cell,) = [cell for cell in notebook.cells if "\nworkdir = " in cell.source]
    config, run = cell.source.split("\nworkdir = ")
    config += "\nfrom configs import digits_stages\nwith config.unlocked():"
    config += "\n    digits_stages.shrink(config.base.stages)\n    config.base.data.evaluation_size = 4"
    cell.source = f"{config}\nworkdir = {run}"


def test_the_token_budget_notebook_runs_and_shows_the_frontier_and_all_maps(monkeypatch):
    monkeypatch.setenv("PIP_DRY_RUN", "1")  # its first cell would point the environment of the tests at this checkout
    notebook = nbformat.read(COLABS / "token_budget.ipynb", as_version=4)
    shrunk(notebook)
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(COLABS)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4  # the frontier, and the maps of each budget
    text = "".join(output.get("text", "") for output in outputs)
    assert all(f"{point} tokens read 64 patches" in text for point in ("mlp@64: 64", "pool@1: 1", "pool@16: 16"))


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS] == ["token_budget.ipynb"]

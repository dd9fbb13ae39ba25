"""Every notebook runs top to bottom in its short form, defines nothing, and begins with the same installation."""

import ast
import importlib.metadata
import json
import re

import jax
import nbclient
import nbformat
import pytest

from colabs import execute, install_cell
from tests.smoke import notebook_install

from .conftest import ROOT, environment

COLABS = ROOT / "colabs"
NAMES = sorted(path.stem for path in COLABS.glob("*.ipynb"))
by_name = pytest.mark.parametrize("name", NAMES)


def code_of(name) -> list[str]:
    """Cells of code, as Python: magics are comments, and a shell command is an expression."""
    cells = [cell.source for cell in execute.read(name, short=False).cells if cell.cell_type == "code"]
    cells = [re.sub(r"^[!%](.*\\\n)*.*", "...", cell, flags=re.M) for cell in cells]
    return cells


def test_there_are_notebooks():
    assert set(NAMES) == set(execute.SHORT)
    assert set(NAMES) == {
        "ask_a_release",
        "fine_tune",
        "look_inside",
        "plan_a_pod",
        "reduce_a_release",
        "token_budget",
    }


@by_name
def test_a_notebook_defines_nothing(name):
    for source in code_of(name):
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda), source


@by_name
def test_a_notebook_begins_with_the_installation_and_has_no_outputs(name):
    """`python colabs/install_cell.py` makes it so."""
    text = (COLABS / f"{name}.ipynb").read_text()
    cells = [cell for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    assert cells[0].source == install_cell.install_cell()
    assert not [cell for cell in cells if cell.outputs or cell.execution_count is not None]
    assert install_cell.rewritten(text) == text


@by_name
def test_whatever_a_notebook_installs_leaves_the_installed_jax(name):
    """tests/smoke/notebook_install.py runs these lines."""
    lines = [line for cell in execute.read(name, short=False).cells for line in cell.source.splitlines()]
    lines = [line for line in lines if re.search(r"\bpip3? +install|\buv +", line)]
    assert lines and all(line.startswith("%pip install --quiet --constraint {constraints} ") for line in lines), lines


def test_an_installation_that_failed_is_reported(tmp_path, monkeypatch):
    """`%pip` prints an error of pip and goes on."""
    (tmp_path / "vlm_jax").mkdir()
    (tmp_path / "vlm_jax" / "types.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.metadata, "distributions", list)
    cell = compile(re.sub(r"^%pip .*$", "", install_cell.install_cell(), flags=re.M), "cell", "exec")
    with pytest.raises(RuntimeError, match=re.escape(f"The lowest JAX is in {tmp_path / 'setup.py'}")):
        exec(cell, {})


def test_the_address_of_the_repository_is_in_one_place():
    """A change of it reaches all notebooks, and nothing else names it."""
    others = [path for path in COLABS.glob("*.py") if path.name != "install_cell.py"]
    assert not [path for path in others if install_cell.REPOSITORY in path.read_text()]
    for name in NAMES:
        text = (COLABS / f"{name}.ipynb").read_text()
        assert text.count(install_cell.REPOSITORY) == 1
        cells = json.loads(text)["cells"]
        assert sum("git" in "".join(cell["source"]) and "clone" in "".join(cell["source"]) for cell in cells) == 1


def test_a_notebook_that_is_opened_alone_finds_the_package(tmp_path, monkeypatch):
    """Its cell clones the repository, pins the JAX that is there, puts the clone on the path, and can be run again.

    The environment of the tests stays as it is; tests/smoke/notebook_install.py installs in one of its own.
    """
    for name in ("clone", "alone"):
        (tmp_path / name).mkdir()
    cell = notebook_install.cell_of(notebook_install.repository(tmp_path / "clone"))
    cell, count = re.subn(r"^%pip install --quiet --constraint {constraints} .*$", "", cell, flags=re.M)
    assert count == 1
    shown = "import vlm_jax, configs\nprint(vlm_jax.__file__, configs.__path__, *pinned)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (cell, cell, shown)])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path / "alone")}})
    client.execute()
    text = "".join(output.get("text", "") for output in notebook.cells[2].outputs)
    assert str(tmp_path / "alone" / "vlm_jax_repository" / "vlm_jax") in text
    assert f"jax=={jax.__version__}" in text.split() and "jaxtyping" not in text
    assert not list((tmp_path / "alone").glob("*.txt"))  # the constraints are gone


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The home folder of the notebooks, in which the first that needs a small release leaves it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        for name, value in environment(1).items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def ran(home):
    def run(name):
        """The text of all outputs, and the number of figures of a notebook."""
        notebook = execute.write(name, short=True)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        text = "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)
        return text, sum("image/png" in output.get("data", {}) for output in outputs)

    return run


def test_token_budget(ran):
    text, figures = ran("token_budget")
    assert figures == 5  # the pages, the frontier, and the maps of each budget
    assert all(f"{point} tokens read 64 patches" in text for point in ("mlp@64: 64", "pool@1: 1", "pool@16: 16"))


def test_ask_a_release(ran):
    """A blue square in the second row and the third column of four."""
    text, figures = ran("ask_a_release")
    assert "answer: blue" in text and "visual tokens: (64,)" in text and "small-release" in text
    assert "NamedBox(box=(32.0, 16.0, 48.0, 32.0)" in text
    assert figures == 3


def test_fine_tune(ran):
    """The new model answers what the release could not, about pictures that it has not seen."""
    text, figures = ran("fine_tune")
    told = re.search(r"vqa: ([\d.]+) \(", text)
    assert told is not None and float(told[1]) > 0.9, text[-2000:]
    assert figures == 2 and "the release with the trained parameters" in text


def test_reduce_a_release(ran):
    """The release answers; no reducer is better than it, and its row says so in the table."""
    text, figures = ran("reduce_a_release")
    rows = re.findall(r"^(none|random|visionzip) +(all|32|16) +([\d.]+) \[", text, re.M)
    accuracy = {(name, tokens): float(value) for name, tokens, value in rows}
    assert set(accuracy) == {("none", "all"), *((name, n) for name in ("random", "visionzip") for n in ("32", "16"))}
    assert accuracy["none", "all"] > 90 and max(accuracy.values()) == accuracy["none", "all"]
    assert figures == 2


def test_look_inside(ran):
    text, figures = ran("look_inside")
    assert figures == 4 and "(6, 32, 32, 3)" in text


def test_plan_a_pod(ran):
    text, figures = ran("plan_a_pod")
    assert figures == 2 and "v5e" in text

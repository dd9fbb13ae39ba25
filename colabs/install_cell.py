"""The first code cell of every notebook, which installs the package.

The owner of a repository sets its address below, once, and runs `python colabs/install_cell.py`, which writes the cell
into every notebook and removes outputs.
"""

import json
import pathlib

REPOSITORY = "https://github.com/OWNER/vlm_jax"
CELL = """\
# Installs vlm_jax: from the clone that this notebook is in, or else from a fresh one. An installed JAX stays as it is.
import importlib.metadata
import pathlib
import subprocess
import sys

REPOSITORY = "{repository}"

here = pathlib.Path.cwd()
root = next((path for path in (here, *here.parents) if (path / "vlm_jax" / "types.py").exists()), None)
if root is None:
    root = here / "vlm_jax_repository"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, str(root)], check=True)
installed = {{one.metadata["Name"].lower(): one.version for one in importlib.metadata.distributions()}}
pinned = [f"{{name}}=={{version}}" for name, version in installed.items() if name.startswith(("jax", "libtpu"))]
constraints = pathlib.Path("jax_as_installed.txt")
constraints.write_text("\\n".join(pinned))
%pip install --quiet --constraint {{constraints}} --editable {{root}}
constraints.unlink()
sys.path.insert(0, str(root))"""
COLABS = pathlib.Path(__file__).resolve().parent
FIRST_LINE = CELL.splitlines()[0]


def install_cell() -> str:
    """The source of the cell."""
    return CELL.format(repository=REPOSITORY)


def rewritten(text: str) -> str:
    """A notebook with this cell in place of its own, and without outputs."""
    notebook = json.loads(text)
    for number, cell in enumerate(notebook["cells"]):
        cell["id"] = f"cell-{number}"
        if cell["cell_type"] != "code":
            continue
        cell.update({"outputs": [], "execution_count": None, "metadata": {}})
        if "".join(cell["source"]).startswith(FIRST_LINE):
            cell["source"] = install_cell().splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path in sorted(COLABS.glob("*.ipynb")):
        path.write_text(rewritten(path.read_text()))

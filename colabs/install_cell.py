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
clone = here / "vlm_jax_repository"
root = next((path for path in (clone, here, *here.parents) if (path / "vlm_jax" / "types.py").exists()), None)
if root is None:
    subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, str(clone)], check=True)
    root = clone
installed = sorted({{(one.name or "").lower() for one in importlib.metadata.distributions()}})
names = [name for name in installed if name in ("jax", "jaxlib", "libtpu") or name.startswith(("jax-", "jax_"))]
pinned = [f"{{name}}=={{importlib.metadata.version(name)}}" for name in names]
constraints = pathlib.Path("jax_as_installed.txt")
constraints.write_text("\\n".join(pinned))
%pip install --quiet --constraint {{constraints}} --editable {{root}}
constraints.unlink()
if "vlm_jax" not in [one.name for one in importlib.metadata.distributions()]:
    raise RuntimeError(
        f"pip did not install vlm_jax beside {{' '.join(pinned)}}; its reason is above. The lowest JAX is in "
        f"{{root / 'setup.py'}}: take a runtime with a later one, or upgrade JAX, restart, and run this cell again."
    )
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

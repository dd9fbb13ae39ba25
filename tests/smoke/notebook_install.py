"""python tests/smoke/notebook_install.py [--venv=FOLDER]: what notebooks install, beside the lowest JAX of setup.py.

A notebook that is opened alone clones the repository and installs it; one also installs the compiler of TPUs. This
makes an environment with the lowest JAX, runs the first cell of the notebooks there in an empty folder, from a clone of
this tree, and then again with every later cell that installs. It fails unless `pip freeze` names the same JAX each
time, and the package can be imported. It takes minutes, and installs from the network.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "colabs"))

import install_cell  # noqa: E402 (found by the line above)

CHECK = "import jax, vlm_jax, configs; from vlm_jax.train import small_release; print('jax', jax.__version__)"


def lowest_jax() -> str:
    """The version of `jax>=…` in setup.py."""
    found = re.search(r'"jax>=([\d.]+)"', (ROOT / "setup.py").read_text())
    assert found is not None
    return found[1]


def repository(folder: pathlib.Path) -> pathlib.Path:
    """A Git repository of the package as it is in this tree, committed or not."""
    for name in ("vlm_jax", "configs", "colabs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    author = ["-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
    for words in (["init", "--quiet"], ["add", "."], [*author, "commit", "--quiet", "--message=Copy"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def cell_of(folder: pathlib.Path) -> str:
    """The cell with the address of a repository on this machine."""
    return install_cell.install_cell().replace(install_cell.REPOSITORY, folder.as_uri())


def later_cells() -> list[str]:
    """What notebooks install after their first cell."""
    found = []
    for path in sorted((ROOT / "colabs").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        found += [text for cell in cells[1:] if "%pip" in (text := "".join(cell["source"]))]
    return found


def jax_packages(python: pathlib.Path) -> list[str]:
    """The lines of `pip freeze` that are of JAX itself: not of this package, and not of jaxtyping."""
    done = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if re.match(r"(jax|libtpu)", line, re.I)]
    return sorted(line for line in lines if not line.startswith("jaxtyping"))


def main() -> None:
    """Makes the environment where it is missing, runs the cell, and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=pathlib.Path, help="an environment to make or use; a temporary one if unset")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        venv = given.venv or work / "venv"
        python = venv / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", f"jax=={lowest_jax()}", "ipython"], check=True)
        before = jax_packages(python)
        (work / "clone").mkdir()
        (work / "alone").mkdir()
        first = cell_of(repository(work / "clone"))
        for source in (first, "\n".join((first, *later_cells()))):
            (work / "alone" / "cell.ipy").write_text(source)
            subprocess.run([python, "-m", "IPython", "--no-banner", "cell.ipy"], cwd=work / "alone", check=True)
            subprocess.run([python, "-c", CHECK], cwd=work / "alone" / "vlm_jax_repository", check=True)
            after = jax_packages(python)
            print("before:", *before, "\nafter: ", *after)
            # The compiler of TPUs is no part of the JAX that was there.
            if before != [line for line in after if line in before or not line.startswith("libtpu")]:
                sys.exit("the cells changed the installed JAX")


if __name__ == "__main__":
    main()

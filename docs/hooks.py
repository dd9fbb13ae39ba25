"""The pages that are made while the documentation is built: config keys, commands, systems, notebooks and the API.

mkdocs calls `on_config` and `on_files`; no page made here is kept in the repository.
"""

import ast
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where the compiler of TPUs is installed, none is looked for
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import config_keys  # noqa: E402 (found by the line above)
import flag_tables  # noqa: E402
import metric_tables  # noqa: E402
import notebook_pages  # noqa: E402
import system_tables  # noqa: E402
import token_tables  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402

# Figures that an experiment writes, shown where it writes them.
FIGURES = {"assets/frontier.png": "experiments/digits_token_budget/frontier.png"}
# Modules of their own beside the packages.
MODULES = ("budget", "config", "plugins", "ranges", "system", "types")
API_HEAD = """# API

`vlm_jax.from_pretrained` loads a release; what it returns answers, counts tokens, gives logits and writes the release
back. The packages below are for those who build on it; shapes in signatures have the letters of
[`vlm_jax.types`](types.md).

::: vlm_jax.pretrained.from_pretrained

::: vlm_jax.pretrained.pretrained.Pretrained

## Packages

"""
PAGES: dict[str, Callable[[], str]] = {
    "reference/config.md": config_keys.page,
    "reference/commands.md": flag_tables.page,
    "reference/metrics.md": metric_tables.page,
    "reference/systems.md": system_tables.page,
    "reference/visual-tokens.md": token_tables.page,
}


def api_names() -> list[str]:
    """Packages and modules of `vlm_jax` that have a page, in alphabetical order."""
    packages = [path.parent.name for path in (ROOT / "vlm_jax").glob("*/__init__.py")]
    return sorted([*packages, *MODULES])


def api_page(name: str) -> str:
    """The page of a package with its modules, from their docstrings."""
    return f"# vlm_jax.{name}\n\n::: vlm_jax.{name}\n"


def api_index() -> str:
    """What users of the library call, and the list of packages."""
    rows = [f"- [`vlm_jax.{name}`]({name}.md): {_summary(name)}" for name in api_names()]
    return API_HEAD + "\n".join(rows) + "\n"


def _summary(name: str) -> str:
    """The first sentence of a module's docstring."""
    path = ROOT / "vlm_jax" / name / "__init__.py"
    path = path if path.exists() else path.parent.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def on_config(config: Any) -> Any:
    """Fills the list of API pages into the navigation, where mkdocs.yml has `reference/api/index.md`."""
    pages = [{f"vlm_jax.{name}": f"reference/api/{name}.md"} for name in api_names()]
    _fill(config["nav"], "reference/api/index.md", ["reference/api/index.md", *pages])
    return config


def _fill(entries: list[Any], path: str, pages: list[Any]) -> None:
    for entry in entries:
        for title, content in entry.items() if isinstance(entry, dict) else ():
            if content == path:
                entry[title] = pages
            elif isinstance(content, list):
                _fill(content, path, pages)


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages."""
    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    for path, source in FIGURES.items():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / source)))
    for name in notebook_pages.NAMES:
        text, figures = notebook_pages.page(name)
        files.append(File.generated(config, f"notebooks/{name}.md", content=text))
        for file, content in figures.items():
            files.append(File.generated(config, f"notebooks/{file}", content=content))
    for name in api_names():
        files.append(File.generated(config, f"reference/api/{name}.md", content=api_page(name)))
    files.append(File.generated(config, "reference/api/index.md", content=api_index()))
    return files

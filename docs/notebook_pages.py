"""Pages of the notebooks in colabs/, with their outputs and figures."""

import base64
import html
import re

from colabs import execute
from colabs.install_cell import FIRST_LINE

NAMES = tuple(execute.SHORT)
LINES = 40  # of an output that are shown
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
_LOG = re.compile(r"^I\d{4} \d\d:\d\d:\d\d\.\d+ .*\n", re.M)  # absl's lines of information, with times and threads
_SHORT = (
    " These outputs are of the short form that CI runs, with fewer steps, fewer questions or a smaller model; the text "
    "tells what the notebook itself finds."
)


def page(name: str) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its figures by file name."""
    notebook, parts, figures, heading = execute.kept(name), list[str](), dict[str, bytes](), name
    short = execute.sources(notebook) != execute.sources(execute.read(name, short=False))
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            heading = (re.findall(r"^#+ (.+)", cell.source, re.M) or [heading])[-1]
            if len(parts) == 1:
                parts.append(f"*The file is `colabs/{name}.ipynb`, run on a CPU.{_SHORT * short}*")
            continue
        if cell.source.startswith(FIRST_LINE):
            parts.append(f'??? note "Installation"\n    ```python\n{_indented(cell.source)}\n    ```')
        else:
            parts.append(f"```python\n{cell.source}\n```")
        text = ""
        for output in cell.outputs:
            if output.output_type == "stream":
                text += output.text if output.name == "stdout" else ""  # not the warnings of other packages
                continue
            data = output.get("data", {})
            if "image/png" in data:
                file = f"{name}-{len(figures)}.png"
                figures[file] = base64.b64decode(data["image/png"])
                # A link to itself, so that a narrow screen can show it at its full size.
                parts += [_shown(text), f'[![{heading}]({file}){{ loading="lazy" }}]({file})']
                text = ""
            elif "text/plain" in data:
                text += data["text/plain"].rstrip() + "\n"
        parts.append(_shown(text))
    return "\n\n".join(part for part in parts if part) + "\n", figures


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def _shown(text: str) -> str:
    """An output of text, shortened in the middle."""
    lines = _LOG.sub("", _ESCAPES.sub("", text)).rstrip().splitlines()
    if len(lines) > LINES:
        lines = [*lines[: LINES // 2], "…", *lines[-LINES // 2 :]]
    return f'<pre class="output">{html.escape(chr(10).join(lines))}</pre>' if lines else ""

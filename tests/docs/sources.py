"""Commands and code of the pages, with the marks that stand before them in the source of a page.

    <!-- not run: WHY -->       the next block is not run
    <!-- run with: WORDS -->    its commands are run with these words added, which shorten them
    <!-- fails: TEXT -->        its commands end with status 1 and an error that has the text
    <!-- in the background: TEXT -->  its command runs until the end of the page, which goes on when it says the text

A block with a title is a file that the reader writes, or, of language diff, changes.
"""

import dataclasses
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKS = ("not run", "run with", "fails", "in the background")
_FENCE = re.compile(r"(?:<!-- ([a-z ]+): ([^\n]*?) -->\n)?^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)
_COMMAND = re.compile(r"vlm_jax\.cli\.(\w+)((?:[^\n`]|\\\n)*)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
      language: as bash, python, json, diff or text.
      title: path of the file that it is, else "".
      text: between the fences.
      mark, detail: those of the comment before it, else "".
    """

    language: str
    title: str
    text: str
    mark: str
    detail: str

    def commands(self) -> list[list[str]]:
        """The words of every line of a bash block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def name_of(page: pathlib.Path) -> str:
    """The path of a page from the root."""
    return str(page.relative_to(ROOT))


def blocks(page: pathlib.Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = []
    for mark, detail, language, title, text in _FENCE.findall(page.read_text()):
        if mark and mark not in MARKS:
            raise ValueError(f"{page}: expected one of {', '.join(MARKS)} as a mark, got '{mark}'")
        found.append(Block(language, title, text, mark, detail))
    return found


def used_flags(page: pathlib.Path) -> list[tuple[str, str]]:
    """(command, flag without dashes) of every `vlm_jax.cli` command on a page, those in quotes and in tables too."""
    return [
        (command, flag.removeprefix("no"))
        for command, rest in _COMMAND.findall(page.read_text())
        for flag in re.findall(r"(?<!\S)--([\w.-]+)", re.split(r"[\"']?\s>\s|\s\|\s", rest)[0])
    ]


def loose_flags(page: pathlib.Path) -> list[str]:
    """Flags that a page names outside of blocks, as `--draw=out.png` in a table."""
    outside = _FENCE.sub("", page.read_text())
    found = [flag for code in re.findall(r"`([^`\n]+)`", outside) for flag in re.findall(r"(?<!\S)--([\w.]+)", code)]
    return [flag for flag in found if "vlm_jax" not in flag]

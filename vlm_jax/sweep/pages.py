"""Results between two marks of a Markdown page, written anew by the command that made them."""

import pathlib

MARKS = ("<!-- results -->\n", "<!-- end of results -->")


def shown(page: pathlib.Path) -> str:
    """What a page has between its marks.

    Raises:
      ValueError: the page lacks a mark, or has one twice.
    """
    return _parts(page)[1]


def show(page: pathlib.Path, text: str) -> None:
    """Replaces what a page has between its marks.

    Args:
      page: of Markdown, with MARKS.
      text: Markdown; ends with a new line.

    Raises:
      ValueError: as of `shown`; nothing is written.
    """
    before, _, after = _parts(page)
    page.write_text(before + MARKS[0] + text + MARKS[1] + after, encoding="utf-8")


def _parts(page: pathlib.Path) -> tuple[str, str, str]:
    content = page.read_text(encoding="utf-8")
    for mark in MARKS:
        if content.count(mark) != 1:
            raise ValueError(f"{page}: expected one line '{mark.strip()}', got {content.count(mark)}")
    before, rest = content.split(MARKS[0])
    text, after = rest.split(MARKS[1])
    return before, text, after


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))

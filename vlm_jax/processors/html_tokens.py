"""Tags and texts of HTML, in time linear in its length, whatever it is.

`html.parser` of Python takes a minute for 40,000 tags that do not end, and raises an AssertionError for `<![x[`.
"""

import dataclasses
import html
import re
from collections.abc import Iterator

RAW = frozenset(("script", "style"))  # elements whose text has no tags
_OPENING = re.compile(r"<([a-zA-Z][^\s/>]*+)")
_ATTRIBUTE = re.compile(r"[\s/]*+([^\s/>][^\s/=>]*+)(?:\s*+=\s*+(?:'([^']*+)'|\"([^\"]*+)\"|(?!['\"])([^\s>]*+)))?+")
_END = re.compile(r"\s*+(/?)[\s/]*+>")
_CLOSING = re.compile(r"</([a-zA-Z][^\s/>]*+)[^>]*+>")


@dataclasses.dataclass(frozen=True)
class StartTag:
    """The start of an element; `attributes` has None for one without a value."""

    name: str
    attributes: dict[str, str | None]


@dataclasses.dataclass(frozen=True)
class EndTag:
    """The end of an element."""

    name: str


Token = StartTag | EndTag | str


def html_tokens(text: str) -> Iterator[Token]:
    """Tags and the texts between them, in order, with character references resolved.

    Comments and declarations are left out, and so is a tag at the end that is cut off. A tag that ends with `/>` is
    the start and the end of its element.

    Source: WHATWG HTML Living Standard, section 13.2.5 (Tokenization).
    """
    place = 0
    while place < len(text):
        found = text.find("<", place)
        if found != place:
            yield _resolved(text[place : len(text) if found < 0 else found])
        if found < 0:
            return
        if opening := _OPENING.match(text, found):
            tag, is_closed, place = _start_tag(text, opening)
            if tag is None:
                return
            yield tag
            if is_closed:
                yield EndTag(tag.name)
            elif tag.name in RAW:
                raw = re.compile(rf"</{tag.name}(?=[\s/>])", re.IGNORECASE).search(text, place)
                stop = raw.start() if raw else len(text)
                yield text[place:stop]
                place = stop
        elif closing := _CLOSING.match(text, found):
            yield EndTag(closing[1].lower())
            place = closing.end()
        elif text.startswith(("</", "<!", "<?"), found):
            end = "-->" if text.startswith("<!--", found) else ">"
            stop = text.find(end, found + 2)
            if stop < 0:
                return
            place = stop + len(end)
        else:
            yield "<"
            place = found + 1


def _start_tag(text: str, opening: re.Match[str]) -> tuple[StartTag | None, bool, int]:
    """The tag, None where it is cut off; whether it is the element's end too; and the place after it."""
    place, attributes = opening.end(), {}
    while found := _ATTRIBUTE.match(text, place):
        name, *values = found.groups()
        value = next((value for value in values if value is not None), None)
        attributes[name.lower()] = None if value is None else _resolved(value)
        place = found.end()
    end = _END.match(text, place)
    if end is None:
        return None, False, len(text)
    return StartTag(opening[1].lower(), attributes), bool(end[1]), end.end()


def _resolved(text: str) -> str:
    try:
        return html.unescape(text)
    except ValueError:  # a numeric reference of more digits than Python reads
        return text

"""HTML: tables by the similarity of their trees (TEDS), documents by that and by the edit distance of the markup."""

import abc
import functools
import html.parser
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from rapidfuzz.distance import Levenshtein

from vlm_jax.evals.metrics.metric import Response, ratio
from vlm_jax.evals.metrics.tree_distance import Node, tree_distance

_VOID = frozenset({"br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"})
_ROWS = frozenset({"thead", "tbody", "tfoot"})
# Elements that the start of an element ends, up to an element that holds these.
_ENDED = {
    **dict.fromkeys(("td", "th"), frozenset({"td", "th"})),
    "tr": frozenset({"td", "th", "tr"}),
    **dict.fromkeys(_ROWS, frozenset({"td", "th", "tr"}) | _ROWS),
    "li": frozenset({"li"}),
    "p": frozenset({"p"}),
    "option": frozenset({"option"}),
}


class _Element:
    """An element with its pieces of text and its elements, in order."""

    def __init__(self, name: str, attributes: dict[str, str]):
        self.name, self.attributes = name, attributes
        self.inside: list[str | _Element] = []

    @property
    def elements(self) -> "list[_Element]":
        return [item for item in self.inside if isinstance(item, _Element)]


class _Builder(html.parser.HTMLParser):
    """Builds the tree of a text, whatever is wrong with it."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.root = _Element("", {})
        self._path = [self.root]

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        """Adds an element, below the ones that it does not end."""
        while self._path[-1].name in _ENDED.get(tag, ()):
            self._path.pop()
        element = _Element(tag, {name: value or "" for name, value in attrs})
        self._path[-1].inside.append(element)
        if tag not in _VOID:
            self._path.append(element)

    def handle_endtag(self, tag: str) -> None:
        """Ends the innermost element of that name, if there is one."""
        places = [place for place, element in enumerate(self._path) if element.name == tag]
        if places and places[-1]:
            del self._path[places[-1] :]

    def parse_marked_section(self, i: int, report: int = 1) -> int:
        """Passes over `<![…>`, for which the base class raises."""
        del report
        return self.parse_bogus_comment(i)

    def handle_data(self, data: str) -> None:
        """Adds a piece of text."""
        self._path[-1].inside.append(data)


def parse(text: str) -> _Element:
    """A root without a name, below which the elements and texts of a piece of HTML are."""
    builder = _Builder()
    builder.feed(text)
    builder.close()
    return builder.root


class _Similarities(abc.ABC):
    """A metric whose values are means of similarities, each with the nearest reference; the first is the score."""

    needs_all: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def similarities(self) -> Sequence[Callable[[str, str], float]]:
        """Functions of (answer, reference), one of each value; in [0, 1]."""

    def score(self, response: Response) -> float:
        """As `Metric.score`."""
        return _nearest(self.similarities[0], response)

    def statistics(self, responses: Sequence[Response]) -> Float[np.ndarray, "responses statistics"]:
        """As `Metric.statistics`: the similarities, and 1."""
        rows = [[*(_nearest(one, response) for one in self.similarities), 1.0] for response in responses]
        return np.array(rows, float).reshape(-1, len(self.similarities) + 1)

    def of_sums(self, sums: Float[np.ndarray, "*resamples statistics"]) -> Float[np.ndarray, "*resamples values"]:
        """As `Metric.of_sums`."""
        return ratio(sums[..., :-1], sums[..., -1:])


def _nearest(similarity: Callable[[str, str], float], response: Response) -> float:
    return max(similarity(response.text, text) for text in response.references)


class Teds(_Similarities):
    """Similarity of tables by the edit distance of their trees; 0 where there is no table. The first table counts.

    A replaced cell costs the edit distance of its characters and tags as a share of the longer one, and 1 where spans
    differ; the distance is divided by the elements of the larger table. The values are the mean, and the mean of the
    same without the content of cells.

    Source: Zhong et al. 2020 (PubTabNet), section 5, and src/metric.py of ibm-aur-nlp/PubTabNet. Deviations: `th` is
    a cell like `td`, a similarity is not negative, and two tables without an element are equal.
    """

    values: ClassVar[tuple[str, ...]] = ("mean", "structure")
    num_statistics: ClassVar[int] = 3

    @property
    def similarities(self) -> Sequence[Callable[[str, str], float]]:
        """As `_Similarities.similarities`."""
        return table_similarity, functools.partial(table_similarity, content=False)


def table_similarity(answer: str, reference: str, *, content: bool = True) -> float:
    """TEDS of the first tables of two texts, in [0, 1]; without `content` of their structures."""
    tables = [_first_table(parse(text)) for text in (answer, reference)]
    if tables[0] is None or tables[1] is None:
        return 0.0
    size = max(_num_elements(table) - 1 for table in tables if table is not None)
    distance = tree_distance(_table_node(tables[0], content), _table_node(tables[1], content), _replaced())
    return max(0.0, 1.0 - distance / size) if size else 1.0


def _first_table(element: _Element) -> _Element | None:
    found = [element]
    while found:
        element = found.pop()
        if element.name == "table":
            return element
        found += reversed(element.elements)
    return None


def _num_elements(element: _Element) -> int:
    """The element and those below it."""
    count, found = 0, [element]
    while found:
        count, found = count + len(found), [child for one in found for child in one.elements]
    return count


def _table_node(element: _Element, content: bool) -> Node:
    """The tree of a table down to its cells."""
    root = Node((element.name,))
    open_nodes = [(element, root)]
    while open_nodes:
        element, node = open_nodes.pop()
        for child in element.elements:
            is_cell = child.name in ("td", "th")
            spans = (_span(child, "colspan"), _span(child, "rowspan")) if is_cell else ()
            label = ("td", *spans) if is_cell else (child.name,)
            below = Node(label, tuple(_pieces(child)) if is_cell and content else ())
            node.children.append(below)
            if not is_cell:
                open_nodes.append((child, below))
    return root


def _span(cell: _Element, name: str) -> str:
    value = cell.attributes.get(name, "1").strip()
    return value.lstrip("0") or "0" if value.isdecimal() else "1"


def _pieces(element: _Element) -> list[str]:
    """Characters and tags inside of an element, in order."""
    pieces: list[str] = []
    todo: list[str | tuple[str] | _Element] = [*reversed(element.inside)]
    while todo:
        item = todo.pop()
        if isinstance(item, _Element):
            pieces.append(f"<{item.name}>")
            todo += [(f"</{item.name}>",), *reversed(item.inside)]
        else:
            pieces += item
    return pieces


class Html(_Similarities):
    """Similarity of HTML documents by the edit distance of their trees, and by that of their markup.

    Nodes are all elements of the body, or of the whole text without one. A replaced element costs the edit distance of
    its own texts as a share of the longer one, and 1 where names differ; the distance is divided by the elements of the
    larger document. The values are the mean, the mean without texts, and the similarity of the markup: 1 -
    Levenshtein's distance of tags and characters, as a share of the longer one. Attributes, and the number of spaces,
    are ignored.

    Source: TEDS (Zhong et al. 2020), of all elements; the markup as the normalized edit distance of OmniDocBench.
    """

    values: ClassVar[tuple[str, ...]] = ("mean", "structure", "markup")
    num_statistics: ClassVar[int] = 4

    @property
    def similarities(self) -> Sequence[Callable[[str, str], float]]:
        """As `_Similarities.similarities`."""
        return document_similarity, functools.partial(document_similarity, content=False), markup_similarity


def document_similarity(answer: str, reference: str, *, content: bool = True) -> float:
    """Similarity of the trees of two documents, in [0, 1]; without `content` of their structures."""
    bodies = [_body(parse(text)) for text in (answer, reference)]
    size = max(_num_elements(body) for body in bodies)
    distance = tree_distance(_document_node(bodies[0], content), _document_node(bodies[1], content), _replaced())
    return max(0.0, 1.0 - distance / size)


def markup_similarity(answer: str, reference: str) -> float:
    """1 - Levenshtein's distance of the tags and characters of two documents, as a share of the longer one."""
    mine, theirs = (_without_spaces(_pieces(_body(parse(text)))) for text in (answer, reference))
    return 1.0 - Levenshtein.distance(mine, theirs) / max(len(mine), len(theirs), 1)


def _without_spaces(pieces: Sequence[str]) -> list[str]:
    """Pieces with one space for several, and none beside a tag."""
    kept: list[str] = []
    for place, piece in enumerate(pieces):
        beside = [*kept[-1:], *pieces[place + 1 : place + 2]]
        if not piece.isspace():
            kept.append(piece)
        elif len(beside) == 2 and not any(len(other) > 1 or other.isspace() for other in beside):
            kept.append(" ")
    return kept


def _body(root: _Element) -> _Element:
    """The body of a document, under a root of its own name; without one all of it."""
    found = [root]
    while found:
        element = found.pop()
        if element.name == "body":
            element.name = ""
            return element
        found += reversed(element.elements)
    return root


def _document_node(element: _Element, content: bool) -> Node:
    root = Node((element.name,), _own_text(element) if content else ())
    open_nodes = [(element, root)]
    while open_nodes:
        element, node = open_nodes.pop()
        for child in element.elements:
            below = Node((child.name,), _own_text(child) if content else ())
            node.children.append(below)
            open_nodes.append((child, below))
    return root


def _own_text(element: _Element) -> tuple[str, ...]:
    """Characters of an element's own texts, with one space for several."""
    return tuple(" ".join("".join(item if isinstance(item, str) else " " for item in element.inside).split()))


def _replaced() -> Callable[[Node, Node], float]:
    """The cost of replacing a node, remembered by what the nodes are."""

    @functools.lru_cache(maxsize=100_000)
    def share(mine: tuple[str, ...], theirs: tuple[str, ...]) -> float:
        return Levenshtein.distance(mine, theirs) / max(len(mine), len(theirs), 1)

    def cost(mine: Node, theirs: Node) -> float:
        if mine.label != theirs.label:
            return 1.0
        return 0.0 if mine.content == theirs.content else share(mine.content, theirs.content)

    return cost

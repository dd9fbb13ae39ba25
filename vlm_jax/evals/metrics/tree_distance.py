"""The edit distance of ordered trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass
class Node:
    """A node of a tree.

    Attributes:
      label: what makes nodes of one kind, such as an element's name.
      content: of the node itself.
      children: in order.
    """

    label: tuple[str, ...]
    content: tuple[str, ...] = ()
    children: list[Node] = dataclasses.field(default_factory=list)


def tree_distance(first: Node, second: Node, replacement: Callable[[Node, Node], float]) -> float:
    """The lowest cost of removing, inserting and replacing nodes that turns one tree into the other.

    Args:
      first, second: roots.
      replacement: cost of replacing a node; removing or inserting one costs 1. The time is that of the product of both
        trees' numbers of nodes and depths.

    Source: Zhang and Shasha 1989, section 4.
    """
    (nodes, left), (others, other_left) = _in_postorder(first), _in_postorder(second)
    distances = [[0.0] * len(others) for _ in nodes]
    for root in _key_roots(left):
        for other_root in _key_roots(other_left):
            _fill(distances, nodes, left, root, others, other_left, other_root, replacement)
    return distances[-1][-1]


def _fill(
    distances: list[list[float]],
    nodes: list[Node],
    left: list[int],
    root: int,
    others: list[Node],
    other_left: list[int],
    other_root: int,
    replacement: Callable[[Node, Node], float],
) -> None:
    """Sets the distances of the subtrees on the left paths below two key roots, from those of the forests before."""
    start, other_start = left[root], other_left[other_root]
    forests = [[float(place) for place in range(other_root - other_start + 2)]]
    for node in range(start, root + 1):
        before, row = forests[-1], [node - start + 1.0]
        for place, other in enumerate(range(other_start, other_root + 1), start=1):
            cost = min(before[place], row[place - 1]) + 1
            if left[node] == start and other_left[other] == other_start:
                cost = min(cost, before[place - 1] + replacement(nodes[node], others[other]))
                distances[node][other] = cost
            else:
                rest = forests[left[node] - start][other_left[other] - other_start]
                cost = min(cost, rest + distances[node][other])
            row.append(cost)
        forests.append(row)


def _in_postorder(root: Node) -> tuple[list[Node], list[int]]:
    """The nodes, children first, and the index of the leftmost leaf below each."""
    nodes: list[Node] = []
    left: list[int] = []
    path: list[tuple[Node, int, int]] = [(root, 0, 0)]  # node, children done, nodes before its first leaf
    while path:
        node, done, start = path.pop()
        if done < len(node.children):
            path += [(node, done + 1, start), (node.children[done], 0, len(nodes))]
        else:
            nodes.append(node)
            left.append(start)
    return nodes, left


def _key_roots(left: list[int]) -> list[int]:
    """The highest node over each leftmost leaf, in order."""
    return sorted({leaf: node for node, leaf in enumerate(left)}.values())

"""Leaves of a tree of parameters by path, and trees of some of the leaves."""

from collections.abc import Callable, Collection
from typing import Any

import jax

from vlm_jax.types import Params, Tree


def flatten(tree: Tree) -> list[tuple[str, Tree]]:
    """(path, leaf) in tree order; names are joined by `/`, without entries for boxes of axis names."""
    return [(path_of(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def path_of(path: tuple[Any, ...]) -> str:
    """A leaf's path from its keys in the tree."""
    return "/".join(str(getattr(part, "key", getattr(part, "idx", None))) for part in path if not _is_box(part))


def map_with_path(function: Callable[..., Tree], tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` of a function whose first argument is the path of the leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_of(path), *leaves), tree, *rest)


def split(params: Params, paths: Collection[str]) -> tuple[Params, Params]:
    """The tree of the leaves at `paths` and that of the others, both without empty subtrees; see `joined`."""
    chosen: Params = {}
    others: Params = {}

    def visit(tree: Params, before: str, chosen: Params, others: Params) -> None:
        for name, value in tree.items():
            if isinstance(value, dict):
                halves: tuple[Params, Params] = ({}, {})
                visit(value, f"{before}{name}/", *halves)
                for half, out in zip(halves, (chosen, others), strict=True):
                    if half:
                        out[name] = half
            else:
                (chosen if before + name in paths else others)[name] = value

    visit(params, "", chosen, others)
    return chosen, others


def joined(first: Params, second: Params) -> Params:
    """The tree with the leaves of both; at the same path the second one's."""
    both = dict(first)
    for name, value in second.items():
        both[name] = joined(both[name], value) if name in both and isinstance(value, dict) else value
    return both


def below(params: Params, paths: Collection[str]) -> dict[str, Tree]:
    """Leaf by path, of the leaves that are at one of `paths` or below it."""
    return {
        path: leaf for path, leaf in flatten(params) if any(path == one or path.startswith(f"{one}/") for one in paths)
    }


def _is_box(part: Tree) -> bool:
    return isinstance(part, jax.tree_util.GetAttrKey) and part.name == "value"

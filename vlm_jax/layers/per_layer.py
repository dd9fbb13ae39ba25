"""Layers as separate arrays instead of one stack, for generation on a CPU.

XLA's CPU backend multiplies only by whole arrays: a scan over a stack of kernels first copies the kernel of each layer
out of it, so that a generation step, which is bound by reading the parameters, moves three times as much memory.
`layers_apart` copies each layer's parameters out of their stacks once, and `TransformerStack` runs such layers in
sequence (`in_sequence`). Compile time then grows with the depth.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.types import Tree


@jax.tree_util.register_pytree_node_class
class PerLayer:
    """The contents of a stack [L, ..] as one array per layer; indexed like the stack, by numbers and slices."""

    def __init__(self, layers: Iterable[Any]):
        self.layers = tuple(layers)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.layers), *self.layers[0].shape)

    def __getitem__(self, index: Any) -> Any:
        return PerLayer(self.layers[index]) if isinstance(index, slice) else self.layers[index]

    def tree_flatten(self) -> tuple[Any, None]:
        return self.layers, None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "PerLayer":
        return cls(children)


def is_per_layer(tree: Tree) -> bool:
    """Whether `tree` is a `PerLayer`, which is a leaf of trees of stacks."""
    return isinstance(tree, PerLayer)


def has_per_layer(tree: Tree) -> bool:
    """Whether a leaf of `tree` is a `PerLayer`."""
    return any(map(is_per_layer, jax.tree.leaves(tree, is_leaf=is_per_layer)))


def layers_apart(params: Tree, within: bool = False) -> Tree:
    """Parameters whose stacks of scanned layers are `PerLayer`s; others are unchanged.

    Not for use under `jit`: the layers are copied on the host, so memory holds them twice while both trees exist.
    """
    if isinstance(params, dict):
        return {name: layers_apart(value, within or name == "layers") for name, value in params.items()}
    if not within or is_per_layer(params):
        return params
    return PerLayer(jax.device_put(layer, may_alias=False) for layer in np.asarray(params))


def of_layers(stacks: Tree, index: int | slice | jax.Array) -> Tree:
    """The tree of one layer, or of a slice of the layers, from a tree of stacks."""
    return jax.tree.map(lambda leaf: leaf[index], stacks, is_leaf=is_per_layer)


def stacked(layers: Tree) -> Tree:
    """A tree of one layer as one of stacks of one layer."""
    return jax.tree.map(lambda leaf: PerLayer([leaf]), layers)


def in_sequence(layer: Callable[..., Tree], x: jax.Array, inputs: Tree, depth: int) -> tuple[jax.Array, Tree]:
    """As `jax.lax.scan(layer, x, inputs)`, without a loop; `layer` is traced once, and its outputs are `PerLayer`s."""
    layer, outputs = jax.jit(layer), []
    for index in range(depth):
        x, output = layer(x, of_layers(inputs, index))
        outputs.append(output)
    # Taken from the stack of all layers, by an index that XLA does not know, 0 unless there is no use in going on: so
    # what is written to a cache waits for every layer's read of it. XLA would else write some before they are read,
    # and copy them first.
    unknown = jnp.isnan(x.reshape(-1)[0]).astype(jnp.int32)

    def after_all(*leaves: jax.Array) -> PerLayer:
        stack = jnp.stack(leaves)
        return PerLayer(jax.lax.dynamic_index_in_dim(stack, index + unknown, keepdims=False) for index in range(depth))

    return x, jax.tree.map(after_all, *outputs)


def joined(first: Any, second: Any) -> Any:
    """The layers of `first`, an array or a `PerLayer`, followed by those of `second`, of the same kind."""
    if is_per_layer(first):
        return PerLayer((*first.layers, *second.layers))
    return jnp.concatenate([first, second])


def written(old: Any, fresh: Any, start: Any, axis: int | None) -> Any:
    """`old`, a stack or a `PerLayer`, with `fresh` written from slot `start` of `axis` (negative) on; as `fresh` is.

    Without an axis of slots `fresh` takes the place of `old`.
    """
    if axis is None:
        return fresh
    if is_per_layer(fresh):
        return PerLayer(written(old[index], layer, start, axis) for index, layer in enumerate(fresh.layers))
    starts = [start if place == axis % old.ndim else 0 for place in range(old.ndim)]
    return jax.lax.dynamic_update_slice(old, fresh.astype(old.dtype), starts, allow_negative_indices=False)

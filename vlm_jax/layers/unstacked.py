"""Layers as arrays of their own instead of one stack, for platforms that would copy each out of it.

XLA's CPU backend multiplies by whole arrays alone: a scan over a stack of kernels first copies the kernel of
each layer, so that a step of generation, whose time is that of reading the parameters, moves three times as
much memory. `Unstacked` holds an array a layer. The scan goes over the layers' numbers, and where a product
wants the layer's own array there are as many branches as layers, of which one runs. A branch holds its
product and nothing else, and the products compile to calls of a library, so that compile time hardly grows.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

KERNEL = "kernel"  # the name of a linear layer's matrix


@jax.tree_util.register_pytree_node_class
class Unstacked:
    """What a stack [L, ..] holds, one array a layer; indexed like the stack.

    The number of every layer is an array too: were it a constant, each layer's write would be another program.
    """

    def __init__(self, layers: Iterable[Any], numbers: Iterable[Any]):
        self.layers, self.numbers = tuple(layers), tuple(numbers)

    @classmethod
    def of(cls, stack: jax.Array) -> "Unstacked":
        """Copies every layer out of `stack`, on the host, so that nothing is compiled; not for use inside a program."""
        layers, numbers = np.asarray(stack), np.arange(len(stack), dtype=np.int32)
        return cls(
            *([jax.device_put(np.asarray(leaf), may_alias=False) for leaf in leaves] for leaves in (layers, numbers))
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.layers), *self.layers[0].shape)

    @property
    def dtype(self) -> Any:
        return self.layers[0].dtype

    def __getitem__(self, index: Any) -> Any:
        """The layer's array for an int, a choice among all for one that is computed, fewer layers for a slice."""
        if isinstance(index, slice):
            layers = self.layers[index]
            return Unstacked(layers, self.numbers[: len(layers)])
        return self.layers[index] if isinstance(index, int) else OneOf(self.layers, index)

    def written(self, fresh: Float[Array, "L *shape"], start: Any, axis: int) -> "Unstacked":
        """With the layers of `fresh` written from slot `start` of `axis` on."""
        pairs = zip(self.layers, self.numbers, strict=True)
        return Unstacked([written(old, _layer_of(fresh, i), start, axis) for old, i in pairs], self.numbers)

    def tree_flatten(self) -> tuple[Any, None]:
        return (self.layers, self.numbers), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "Unstacked":
        return cls(*children)


@jax.tree_util.register_pytree_node_class
class OneOf:
    """The array of one layer, by a number that is computed; see `picked`."""

    def __init__(self, layers: Sequence[Any], index: Any):
        self.layers, self.index = tuple(layers), index

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layers[0].shape

    @property
    def dtype(self) -> Any:
        return self.layers[0].dtype

    def tree_flatten(self) -> tuple[Any, None]:
        return (self.layers, self.index), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "OneOf":
        return cls(*children)


def picked(function: Callable[..., Any], layer: Any, *operands: Any) -> Any:
    """`function(layer, *operands)`; of a `OneOf` by a branch a layer, whose array is not copied."""
    if not isinstance(layer, OneOf):
        return function(layer, *operands)

    shared = jax.jit(function)  # traced once for all branches

    def branch(number: int) -> Callable[..., Any]:
        return lambda layers, *operands: shared(layers[number], *operands)

    branches = [branch(number) for number in range(len(layer.layers))]
    return jax.lax.switch(layer.index, branches, layer.layers, *operands)


def product(matrix: Any, x: jax.Array, dtype: Any = None) -> jax.Array:
    """x [.., N, I] times a matrix [.., I, O] as it stands or of one layer; summed in `dtype` where it is given.

    One row times the matrix of one layer is written as a sum: as a product XLA's CPU backend would generate code
    for it, for every branch anew, which takes most of the compile time and runs no faster.
    """
    times = _sum_of_rows if isinstance(matrix, OneOf) and x.shape[-2] == 1 else _matmul
    return picked(functools.partial(times, dtype=dtype), matrix, x)


def _matmul(matrix: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    return jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=dtype)


def _sum_of_rows(matrix: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    rows, columns = matrix.shape[-2:]
    many = () if matrix.size == rows * columns else (-1,)  # an axis of size one keeps XLA from its library
    terms = x.reshape(*many, rows, 1) * matrix.astype(x.dtype).reshape(*many, rows, columns)
    return jnp.sum(terms, axis=-2, dtype=dtype).reshape(*x.shape[:-1], columns)


def written(old: Any, fresh: Any, start: Any, axis: int) -> Any:
    """`old`, a stack or an array of one layer, with `fresh` written from slot `start` of `axis` (negative) on."""
    if isinstance(old, Unstacked):
        return old.written(fresh, start, axis)
    return jax.lax.dynamic_update_slice_in_dim(old, fresh.astype(old.dtype), start, axis % old.ndim)


def is_unstacked(tree: Any) -> bool:
    """Whether this is an `Unstacked`; a leaf of the trees that layers are taken from."""
    return isinstance(tree, Unstacked)


def has_unstacked(tree: Any) -> bool:
    """Whether there is one among the leaves."""
    return any(map(is_unstacked, jax.tree.leaves(tree, is_leaf=is_unstacked)))


def of_layer(stacks: Any, index: Any) -> Any:
    """The tree of layer `index` from a tree of stacks."""
    return jax.tree.map(lambda leaf: leaf[index], stacks, is_leaf=is_unstacked)


def unstacked_kernels(params: Any, within: bool = False) -> Any:
    """Parameters whose scanned linear layers have their kernels unstacked; all else as it is.

    Not for use inside a program: the kernels are copied, so that they are held twice while both trees are.
    """
    if not isinstance(params, dict):
        return params
    return {
        name: Unstacked.of(value)
        if within and name == KERNEL and getattr(value, "ndim", 0) == 3
        else unstacked_kernels(value, within or name == "layers")
        for name, value in params.items()
    }


def _layer_of(fresh: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(fresh, number, keepdims=False)

"""Each layer's parameters as separate arrays instead of one stack, for platforms that would copy each out of it.

XLA's CPU backend multiplies only by whole arrays: a scan over a stack of kernels first copies the kernel of
each layer, so that a generation step, which is bound by reading the parameters, moves three times as
much memory. `PerLayer` holds one array per layer. The scan runs over the layer indices, and where a product
needs the layer's array there is one branch per layer, of which one runs. A branch contains only its
product, is traced once for all layers, and compiles to a library call, except for the product
of one row and a weight, for which XLA generates new code. The kernel of a linear layer becomes a `weight` with its
output axis first: XLA's CPU backend reads such a matrix faster.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array, Float

from vlm_jax.types import Dtype, Fields

# The names of a linear layer's parameters: a kernel [I, O], or a weight [O, I] as `per_layer_kernels` makes it.
KERNEL, WEIGHT, BIAS = "kernel", "weight", "bias"
# Linear layers with the same input, which `per_layer_kernels` merges.
QUERY_KEY_VALUE, GATE_UP = "query_key_value", "gate_up"
SIDE_BY_SIDE = {QUERY_KEY_VALUE: ("query", "key", "value"), GATE_UP: ("gate", "up")}

_FEW_ROWS = 16


@jax.tree_util.register_pytree_node_class
class PerLayer:
    """The contents of a stack [L, ..] as one array per layer; indexed like the stack.

    For writing, the layer indices are arrays too: with constants, each layer's write would be a separate
    program.
    """

    def __init__(self, layers: Iterable[Any], numbers: Iterable[Any] = ()):
        self.layers, self.numbers = tuple(layers), tuple(numbers)

    @classmethod
    def of(cls, stack: jax.Array, writable: bool = False) -> "PerLayer":
        """Copies every layer out of `stack` on the host, without compiling; not for use under `jit`."""
        layers, numbers = np.asarray(stack), np.arange(len(stack) if writable else 0, dtype=np.int32)
        return cls(
            *([jax.device_put(np.asarray(leaf), may_alias=False) for leaf in leaves] for leaves in (layers, numbers))
        )

    @classmethod
    def of_kernels(cls, *stacks: Any) -> "PerLayer":
        """The concatenated weights [L, O, I] of stacks of kernels [L, I, ..] with one input; copied on the host."""
        kernels = zip(*map(np.asarray, stacks), strict=True)
        return cls(jax.device_put(np.ascontiguousarray(np.concatenate(layer, axis=-1).T)) for layer in kernels)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.layers), *self.layers[0].shape)

    @property
    def dtype(self) -> Any:
        return self.layers[0].dtype

    def __getitem__(self, index: Any) -> Any:
        """The layer's array for an int, a `LayerChoice` for a traced index, a `PerLayer` for a slice."""
        if isinstance(index, slice):
            layers = self.layers[index]
            return PerLayer(layers, self.numbers[: len(layers)])
        return self.layers[index] if isinstance(index, int) else LayerChoice(self.layers, index)

    def written(self, fresh: Float[Array, "L *shape"], start: Any, axis: int) -> "PerLayer":
        """A copy with the layers of `fresh` written from slot `start` of `axis` on."""
        pairs = zip(self.layers, self.numbers, strict=True)
        return PerLayer([written(old, _layer_of(fresh, i), start, axis) for old, i in pairs], self.numbers)

    def tree_flatten(self) -> tuple[Any, None]:
        return (self.layers, self.numbers), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> "PerLayer":
        return cls(*children)


@jax.tree_util.register_pytree_node_class
class LayerChoice:
    """The array of one layer, by a traced index; see `picked`."""

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
    def tree_unflatten(cls, _: None, children: Any) -> "LayerChoice":
        return cls(*children)


def picked(function: Callable[..., Any], layer: Any, *operands: Any) -> Any:
    """`function(layer, *operands)`, one array; for a `LayerChoice` one branch per layer, without a copy."""
    if not isinstance(layer, LayerChoice):
        return function(layer, *operands)
    leaves, tree = jax.tree.flatten(operands)
    traced = jax.make_jaxpr(lambda array, *leaves: function(array, *jax.tree.unflatten(tree, leaves)))(
        layer.layers[0], *leaves
    )
    own, *rest = traced.jaxpr.invars
    unread = jax.make_jaxpr(lambda *layers: ())(*layer.layers).jaxpr.invars

    def branch(number: int) -> Any:
        """The traced function with the array of layer `number`: `lax.switch` would trace it once per layer."""
        arrays = [*unread[:number], own, *unread[number + 1 :]]
        invars = [*traced.jaxpr.constvars, *arrays, *rest]
        return ClosedJaxpr(traced.jaxpr.replace(constvars=[], invars=invars), ())

    branches = tuple(map(branch, range(len(layer.layers))))
    index = jax.lax.clamp(np.int32(0), jnp.asarray(layer.index, jnp.int32), np.int32(len(branches) - 1))
    return jax.lax.cond_p.bind(index, *traced.consts, *layer.layers, *leaves, branches=branches)[0]


def linear(weight: Any, x: Float[Array, "*batch I"], precision: jax.lax.Precision | None = None) -> jax.Array:
    """x times the transpose of a weight [O, I], an array or a `LayerChoice`; [.., O].

    Few rows are the product's right operand, transposed outside of the branches: XLA's CPU library reads the left one
    in place, and packs the right one. Transposing many rows costs more than that. One row is a vector, for which
    every branch has its own code: this compiles more slowly, but a sum over the last axis runs more slowly.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > _FEW_ROWS:
        y = picked(functools.partial(_rows_times, precision=precision), weight, rows)
    else:
        columns = rows[0] if len(rows) == 1 else rows.T
        y = picked(functools.partial(_times_columns, precision=precision), weight, columns).T
    return y.reshape(*x.shape[:-1], weight.shape[0])


def product(matrix: Any, x: jax.Array, dtype: Dtype = None) -> jax.Array:
    """x [.., N, I] times a matrix [.., I, O], an array or a `LayerChoice`; summed in `dtype` if given.

    One row times the matrix of one layer is written as a sum: for a product XLA's CPU backend would generate code
    in every branch, which takes compile time and runs no faster.
    """
    if isinstance(matrix, LayerChoice) and x.shape[-2] == 1:
        rows, columns = matrix.shape[-2:]
        heads = x.shape[:-2]
        many = () if math.prod(heads) == 1 else (-1,)  # XLA does not call its library with an axis of size one
        summed = picked(functools.partial(_sum_of_rows, dtype=dtype), matrix, x.reshape(*many, rows, 1))
        return summed.reshape(*heads, 1, columns)
    return picked(functools.partial(_matmul, dtype=dtype), matrix, x)


def _rows_times(weight: jax.Array, rows: jax.Array, precision: jax.lax.Precision | None) -> jax.Array:
    return jnp.matmul(rows, weight.astype(rows.dtype).T, precision=precision)


def _times_columns(weight: jax.Array, columns: jax.Array, precision: jax.lax.Precision | None) -> jax.Array:
    return jnp.matmul(weight.astype(columns.dtype), columns, precision=precision)


def _matmul(matrix: jax.Array, x: jax.Array, dtype: Dtype) -> jax.Array:
    return jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=dtype)


def _sum_of_rows(matrix: jax.Array, x: jax.Array, dtype: Dtype) -> jax.Array:
    terms = x * matrix.astype(x.dtype).reshape(*x.shape[:-1], -1)  # one axis for all heads, as in x
    return jnp.sum(terms, axis=-2, dtype=dtype)


def written(old: Any, fresh: Any, start: Any, axis: int) -> Any:
    """`old`, a stack or an array of one layer, with `fresh` written from slot `start` of `axis` (negative) on."""
    if isinstance(old, PerLayer):
        return old.written(fresh, start, axis)
    starts = [start if place == axis % old.ndim else 0 for place in range(old.ndim)]
    return jax.lax.dynamic_update_slice(old, fresh.astype(old.dtype), starts, allow_negative_indices=False)


def is_per_layer(tree: Any) -> bool:
    """Whether `tree` is a `PerLayer`, which is a leaf of parameter trees."""
    return isinstance(tree, PerLayer)


def has_per_layer(tree: Any) -> bool:
    """Whether a leaf of `tree` is a `PerLayer`."""
    return any(map(is_per_layer, jax.tree.leaves(tree, is_leaf=is_per_layer)))


def of_layer(stacks: Any, index: Any) -> Any:
    """The tree of layer `index` from a tree of stacks."""
    return jax.tree.map(lambda leaf: leaf[index], stacks, is_leaf=is_per_layer)


def per_layer_kernels(params: Any, within: bool = False) -> Any:
    """Parameters with the kernels of scanned linear layers replaced by `PerLayer` weights; others are unchanged.

    Linear layers of the same input, listed in `SIDE_BY_SIDE`, become one: fewer and larger products.
    Not for use under `jit`: the kernels are copied, so memory holds them twice while both trees exist.
    """
    if not isinstance(params, dict):
        return params
    if within and _is_linear(params):
        return _with_weight([params])
    together: Fields = {}
    for name, parts in SIDE_BY_SIDE.items() if within else ():
        if all(_is_linear(params.get(part)) for part in parts):
            together[name] = _with_weight([params[part] for part in parts])
            params = {key: value for key, value in params.items() if key not in parts}
    return together | {name: per_layer_kernels(value, within or name == "layers") for name, value in params.items()}


def _is_linear(params: Any) -> bool:
    """Whether `params` are the stacked parameters of a linear layer."""
    return isinstance(params, dict) and getattr(params.get(KERNEL), "ndim", 0) == 3


def _with_weight(parts: Sequence[Fields]) -> Fields:
    """Merges the parameters of linear layers with one input into those of one linear layer."""
    rest = [{name: value for name, value in part.items() if name != KERNEL} for part in parts]
    beside = jax.tree.map(lambda *leaves: jax.device_put(np.concatenate([*map(np.asarray, leaves)], axis=-1)), *rest)
    return {WEIGHT: PerLayer.of_kernels(*(part[KERNEL] for part in parts)), **beside}


def _layer_of(fresh: jax.Array, number: jax.Array) -> jax.Array:
    starts, sizes = (number, *[0] * (fresh.ndim - 1)), (1, *fresh.shape[1:])
    return jax.lax.dynamic_slice(fresh, starts, sizes, allow_negative_indices=False)[0]

"""Shapes and random values of a model's parameters.

Each is traced and compiled once for equal models and inputs: the points of a sweep, its seeds and its shared stages
have the same encoder, and a resumed run builds its model again.
"""

import functools
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from vlm_jax.leaves import map_with_path
from vlm_jax.sharding.rules import shardings, use_mesh
from vlm_jax.types import Params, Tree

Init = Callable[[jax.Array], Params]  # random key -> boxed parameters {part: tree}


def init_of(model: nn.Module, inputs: Tree) -> Init:
    """The function that initialises a model's parameters; the same one for equal models and shapes.

    Args:
      model: an unbound module, hashable.
      inputs: shapes and dtypes of the arguments of its `__call__`, as one tuple.
    """
    leaves, structure = jax.tree.flatten(inputs)
    return _init_of(model, structure, tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves))


@functools.lru_cache(maxsize=64)
def _init_of(model: nn.Module, structure: Hashable, leaves: tuple[Tree, ...]) -> Init:
    def init(key: jax.Array) -> Params:
        zeros = jax.tree.unflatten(cast(Any, structure), [jnp.zeros(shape, dtype) for shape, dtype in leaves])
        return dict(model.init({"params": key, "reduce": key}, *zeros)["params"])

    return init


def boxed_shapes(init: Init) -> Params:
    """Shapes of the parameters, in the boxes that name their axes."""
    return jax.eval_shape(init, jax.random.key(0))


def in_float32(params: Params, paths: Collection[str]) -> Params:
    """Parameters, or their shapes, with those at some paths in float32: master weights."""

    def cast(path: str, leaf: Any) -> Any:
        if path not in paths or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=jnp.float32)
        return leaf.astype(jnp.float32)

    return map_with_path(cast, params) if paths else params


def draw(init: Init, key: jax.Array, parts: Sequence[str], mesh: Mesh | None) -> Params:
    """Initialises only some parts: the compiler removes the computation of the others.

    Args:
      init: from `init_of`.
      key: random key.
      parts: the parts to return.
      mesh: mesh of the parameters; the default device when None.
    """
    if mesh is None:
        return _drawn(init, tuple(parts), None)(key)
    with use_mesh(mesh):
        return _drawn(init, tuple(parts), mesh)(key)


@functools.lru_cache(maxsize=64)
def _drawn(init: Init, parts: tuple[str, ...], mesh: Mesh | None) -> Init:
    def chosen(key: jax.Array) -> Params:
        params = init(key)
        return nn.meta.unbox({part: params[part] for part in parts})

    if mesh is None:
        return jax.jit(chosen)
    shapes = boxed_shapes(init)
    return jax.jit(chosen, out_shardings=shardings({part: shapes[part] for part in parts}, mesh))

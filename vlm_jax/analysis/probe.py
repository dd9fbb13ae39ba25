"""Extracts parameters and activations of a vision transformer by intercepting its modules.

The model's computation is not reimplemented here. Modules are found by their class while the encoder is
traced (`flax.linen.intercept_methods`), so any encoder with `PatchEmbed`, `MultiHeadAttention` and
`TransformerStack` can be analysed, for any fields and parameter names.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from vlm_jax.layers.attention import MultiHeadAttention
from vlm_jax.layers.block import TransformerStack
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.patch_embed import PatchEmbed
from vlm_jax.layers.position_embedding import LearnedPositions2D
from vlm_jax.types import Array, Config, Fields, Params, Tree

_WEIGHTS = "attention_weights"
_PATCHES = "patches"
_BLOCKS_INPUT = "blocks_input"


class _Called(NamedTuple):
    module: nn.Module  # unbound
    path: tuple[str, ...]
    args: tuple


def attention_weights(
    vit: nn.Module, params: Params, images: Float[Array, "B height width channels"]
) -> Float[Array, "L B heads T T"]:
    """Softmax weights of every self-attention layer, float32; rows are queries and sum to 1.

    Attention is linear in its values, so the model's own attention is run again with unit vectors
    as values and without its output projection: the outputs are its weights, after its norms,
    positions, mask and scale.

    Args:
      vit: an encoder whose depth is one `TransformerStack`; class or register tokens may precede
        its patches.
      params: its parameters, boxed or not.
      images: normalised pixels.

    Raises:
      ValueError: the encoder has no stack with self-attention, or several.
    """
    sown = _sown(vit, _arrays(params), images, _sow_weights)
    found = {path[:-1]: value for path, value in sown.items() if path[-1] == _WEIGHTS}
    if len(found) != 1 or next(iter(found.values())).ndim != 5:
        layers = ", ".join("/".join(path) for path in found) or "none"
        raise ValueError(f"{type(vit).__name__}: expected the self-attention of one TransformerStack, found {layers}")
    return next(iter(found.values()))


def _sow_weights(
    next_fun: Callable[..., Tree], args: tuple, kwargs: Fields, context: nn.module.InterceptorContext
) -> Tree:
    module, result = context.module, next_fun(*args, **kwargs)
    is_attention = isinstance(module, MultiHeadAttention) and context.method_name == "__call__"
    # The copy that is run below has no path; cross-attention (of a pooling head) is excluded.
    if not is_attention or not module.path or kwargs.get("inputs_k") is not None:
        return result
    alone, variables = module.clone(parent=None), {"params": module.variables["params"]}
    length, heads = args[0].shape[1], module.num_heads
    head_dim = module.head_dim or args[0].shape[-1] // heads
    columns = []
    for start in range(0, length, head_dim):  # head_dim keys at a time, the number of entries of a value
        with nn.intercept_methods(_unit_values(start, head_dim)):
            read, _ = alone.apply(variables, *args, **kwargs)
        columns.append(read.reshape(-1, length, heads, head_dim))
    weights = jnp.concatenate(columns, axis=-1)[..., :length].transpose(0, 2, 1, 3)
    module.sow("intermediates", _WEIGHTS, weights.astype(jnp.float32))
    return result


def _unit_values(start: int, head_dim: int) -> Callable[..., Tree]:
    """Makes the value of key start + i the unit vector i, and the output projection the identity."""

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        if not isinstance(module, Dense) or module.name not in ("value", "out"):
            return next_fun(*args, **kwargs)
        if module.name == "out":
            return args[0]
        value = next_fun(*args, **kwargs)
        units = jnp.eye(value.shape[1], head_dim, -start, value.dtype)
        return jnp.broadcast_to(jnp.tile(units, value.shape[-1] // head_dim)[None], value.shape)

    return intercept


def patch_size(vit: nn.Module, height: int, width: int) -> int:
    """Vertical distance in pixels between patches of an image of that size, including a hybrid's stem.

    Computed from the encoder's `grid`: the increase of the height for one more row.
    """
    rows = vit.grid(height, width)[0]
    first, second = (
        next(taller for taller in itertools.count(height) if vit.grid(taller, width)[0] == rows + more)
        for more in (1, 2)
    )
    return second - first


def first_filters(
    vit: nn.Module, params: Params, images: Float[Array, "B height width channels"]
) -> Float[Array, "p p c D"]:
    """D filters of p x p pixels and c channels: the stored kernel of the first layer that has such a kernel:

    the patch embedding, or the root of a hybrid's stem.

    Raises:
      ValueError: no layer has a kernel of four axes.
    """

    def has_filters(module: nn.Module) -> bool:
        return getattr(module.variables.get("params", {}).get("kernel"), "ndim", 0) == 4

    found = _calls(vit, params, images, has_filters)
    if not found:
        raise ValueError(f"{type(vit).__name__}: expected a layer with a kernel [p, p, c, D], found none")
    return jnp.asarray(_subtree(params, found[0].path)["kernel"])


def position_embeddings(
    vit: nn.Module, params: Params, images: Float[Array, "B height width channels"]
) -> Float[Array, "R C D"] | None:
    """The position embeddings that the encoder adds to the patches of such images, without the class token's.

    A learned table is returned, interpolated to the images' grid if needed. Other embeddings
    are measured: the input of the blocks, or of a norm before them, minus the patch embeddings.

    Returns:
      Embeddings by row and column; None where nothing is added that is the same for every image (as
      with only rotary positions).
    """
    params = _arrays(params)
    rows, cols = vit.grid(*images.shape[1:3])
    learned = _calls(vit, params, images, lambda module: isinstance(module, LearnedPositions2D))
    if learned:
        module, path, args = learned[0]
        table = module.apply({"params": _subtree(params, path)}, *args)
        return jnp.asarray(table).reshape(rows, cols, -1)
    images = jnp.asarray(images)
    added = _added_to_patches(vit, params, jnp.concatenate([jnp.zeros_like(images[:1]), images]))
    if added is None:
        return None
    size = jnp.abs(added).max()
    # The rounding error of differences of numbers of this size.
    tolerance = 64 * jnp.finfo(getattr(vit, "dtype", jnp.float32)).eps * jnp.maximum(size, 1.0)
    if size == 0 or not jnp.ptp(added, axis=0).max() <= tolerance:  # true for NaN too
        return None
    return added[0].reshape(rows, cols, -1)


def _added_to_patches(vit: nn.Module, params: Params, images: jax.Array) -> jax.Array | None:
    """[B, N, D] float32: inputs of the blocks minus patch embeddings; None unless there is one of each."""
    entered = []

    def sow(next_fun, args, kwargs, context):
        module, is_call = context.module, context.method_name == "__call__"
        if is_call and isinstance(module, Norm | TransformerStack) and len(module.path) == 1 and not entered:
            entered.append(module.path)
            module.sow("intermediates", _BLOCKS_INPUT, args[0])
        result = next_fun(*args, **kwargs)
        if is_call and isinstance(module, PatchEmbed):
            module.sow("intermediates", _PATCHES, result)
        return result

    sown = _sown(vit, params, images, sow)
    patches, inputs = (
        [value for path, value in sown.items() if path[-1] == name] for name in (_PATCHES, _BLOCKS_INPUT)
    )
    if len(patches) != 1 or len(inputs) != 1:
        return None
    count = patches[0].shape[1]
    return inputs[0][:, -count:].astype(jnp.float32) - patches[0].astype(jnp.float32)


def _sown(vit: nn.Module, params: Params, images: jax.Array, interceptor: Callable[..., Any]) -> dict[Any, jax.Array]:
    """The values that an interceptor sows while the encoder runs, by path."""

    @jax.jit
    def run(params, images):
        with nn.intercept_methods(interceptor):
            return vit.apply({"params": params}, images, mutable=["intermediates"])[1]

    intermediates: Tree = flatten_dict(dict(run(params, images).get("intermediates", {})))
    return {path: value for path, (value,) in intermediates.items()}


def _calls(vit: nn.Module, params: Params, images: jax.Array, wanted: Callable[[nn.Module], bool]) -> list[_Called]:
    """Every call of the selected modules, in order, by tracing only."""
    found = []

    def record(next_fun, args, kwargs, context):
        if context.method_name == "__call__" and wanted(context.module):
            found.append(_Called(context.module.clone(parent=None), context.module.path, args))
        return next_fun(*args, **kwargs)

    def run(params, images):
        with nn.intercept_methods(record):
            return vit.apply({"params": params}, images)

    jax.eval_shape(run, _arrays(params), images)
    return found


def _arrays(params: Params) -> Params:
    """Parameters as unboxed device arrays."""
    return jax.tree.map(jnp.asarray, nn.meta.unbox(params))


def _subtree(params: Params, path: tuple[str, ...]) -> Config:
    tree = nn.meta.unbox(params)
    for name in path:
        tree = tree[name]
    return tree

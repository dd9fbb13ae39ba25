"""Our Pallas kernel for TPU, for every mask that `marks` describe: windows, branches, and shards of a longer sequence.

Blocks of keys that no query of a block reads are neither loaded nor computed, whatever the mask; which these are is
found from the marks when the program runs. The forward pass also returns the logarithm of every softmax's sum, from
which `ring` merges the shards. Backward kernels hold logits transposed, [keys, queries], so that what belongs to a
query is a row.

Source: Dao et al. 2022 (FlashAttention), algorithms 1 and 4; Dao 2023, section 3.1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from vlm_jax.layers.attention.marks import Marks, visible, visible_blocks, with_padding
from vlm_jax.layers.attention.tiles import LANES, blocks_of, padded, widened
from vlm_jax.softcap import capped, slope
from vlm_jax.types import Dtype

MASKED = -0.7 * float(np.finfo(np.float32).max)  # the logit of a key that is not read
_ROWS = 8  # sublanes of a register: marks are padded to as many
_NT = (((1,), (1,)), ((), ()))  # x @ y.T
_TN = (((0,), (0,)), ((), ()))  # x.T @ y
Heads = Float[Array, "B _ _ _"]  # heads first


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flash(
    query: Heads, key: Heads, value: Heads, marks: Marks, interpret: bool = False, softcap: float | None = None
) -> Heads:
    """Attention of scaled queries [B, Q, T, H] to keys and values [B, K, S, H]; K divides Q.

    Args:
      query: queries, multiplied by the scale of the logits.
      key: keys.
      value: values.
      marks: who reads whom.
      interpret: runs the kernels as JAX operations, on any platform.
      softcap: as in `Context`.
    """
    return forward(query, key, value, marks, interpret, query.dtype, softcap)[0]


def _saved(
    query: Heads, key: Heads, value: Heads, marks: Marks, interpret: bool, softcap: float | None
) -> tuple[Heads, Any]:
    out, logsumexp = forward(query, key, value, marks, interpret, query.dtype, softcap)
    return out, (query, key, value, marks, out, logsumexp)


def _pulled(interpret: bool, softcap: float | None, saved: Any, gradient: Heads) -> tuple[Heads, Heads, Heads, None]:
    query, key, value, marks, out, logsumexp = saved
    delta = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
    found = backward(query, key, value, marks, logsumexp, delta, gradient, interpret, query.dtype, softcap)
    return *found, None


flash.defvjp(_saved, _pulled)


def forward(
    query: Heads,
    key: Heads,
    value: Heads,
    marks: Marks,
    interpret: bool,
    dtype: Dtype,
    softcap: float | None = None,
) -> tuple[Heads, Float[Array, "B heads T"]]:
    """The outputs in `dtype`, and the logarithm of the sum of every query's exponentials.

    A query that reads no key has some finite output and a sum that is 0 in comparison with any other.
    """
    length, width = query.shape[2], value.shape[3]
    tall, wide = blocks_of(length), blocks_of(key.shape[2])
    marks = with_padding(marks, tall.padded, wide.padded)
    fetched = _fetched(visible_blocks(marks, tall.size, wide.size))
    query, key, value = _tiled(query, tall.padded), _tiled(key, wide.padded), _tiled(value, wide.padded)
    group = query.shape[1] // key.shape[1]
    of_query = lambda b, h, i, j, fetched: (b, h, i, 0)  # noqa: E731
    of_key = lambda b, h, i, j, fetched: (b, lax.div(h, group), lax.max(fetched[b, i, j], 0), 0)  # noqa: E731
    shape = (*query.shape[:3], value.shape[3])
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(*query.shape[:2], tall.count, wide.count),
        in_specs=[
            pl.BlockSpec((1, 1, tall.size, query.shape[3]), of_query),
            pl.BlockSpec((1, 1, wide.size, key.shape[3]), of_key),
            pl.BlockSpec((1, 1, wide.size, value.shape[3]), of_key),
            pl.BlockSpec((1, tall.size, _ROWS), lambda b, h, i, j, fetched: (b, i, 0)),
            pl.BlockSpec((1, _ROWS, wide.size), lambda b, h, i, j, fetched: (b, 0, lax.max(fetched[b, i, j], 0))),
        ],
        out_specs=[
            pl.BlockSpec((1, 1, tall.size, value.shape[3]), of_query),
            pl.BlockSpec((1, 1, 1, tall.size), lambda b, h, i, j, fetched: (b, h, 0, i)),
        ],
        scratch_shapes=[
            pltpu.VMEM((tall.size, LANES), jnp.float32),
            pltpu.VMEM((tall.size, LANES), jnp.float32),
            pltpu.VMEM((tall.size, value.shape[3]), jnp.float32),
        ],
    )
    out, logsumexp = pl.pallas_call(
        functools.partial(_forward_kernel, softcap),
        grid_spec=grid_spec,
        out_shape=[
            jax.ShapeDtypeStruct(shape, dtype),
            jax.ShapeDtypeStruct((*shape[:2], 1, shape[2]), jnp.float32),
        ],
        compiler_params=_parallel(),
        interpret=interpret,
        name="flash_forward",
    )(fetched, query, key, value, _columns(marks.query), _rows(marks.key))
    return out[:, :, :length, :width], logsumexp[:, :, 0, :length]


def _forward_kernel(softcap, fetched, query, key, value, of_query, of_key, out, logsumexp, highest, total, mean):
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        highest[...] = jnp.full(highest.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        mean[...] = jnp.zeros(mean.shape, jnp.float32)

    @pl.when(fetched[b, i, j] == j)
    def _():
        logits = capped(lax.dot_general(query[0, 0], key[0, 0], _NT, preferred_element_type=jnp.float32), softcap)
        queries, keys = of_query[0], of_key[0]
        reads = visible(*(queries[:, n : n + 1] for n in range(4)), *(keys[n : n + 1] for n in range(4)))
        logits = jnp.where(reads, logits, MASKED)
        before = highest[:, :1]
        top = jnp.maximum(before, logits.max(axis=1, keepdims=True))
        weights = jnp.exp(logits - top)
        shrunk = jnp.exp(before - top)
        sums = shrunk * total[:, :1] + weights.sum(axis=1, keepdims=True)
        total[...] = jnp.broadcast_to(sums, total.shape)
        highest[...] = jnp.broadcast_to(top, highest.shape)
        part = lax.dot(weights.astype(value.dtype), value[0, 0], preferred_element_type=jnp.float32)
        mean[...] = shrunk * mean[...] + part

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        sums = jnp.where(total[...] == 0, 1.0, total[...])
        out[0, 0] = (mean[...] / sums[:, :1]).astype(out.dtype)
        logsumexp[0, 0] = jnp.transpose(highest[...] + jnp.log(sums))[:1]


def backward(
    query: Heads,
    key: Heads,
    value: Heads,
    marks: Marks,
    logsumexp: Float[Array, "B heads T"],
    delta: Float[Array, "B heads T"],
    gradient: Heads,
    interpret: bool,
    dtype: Dtype,
    softcap: float | None = None,
) -> tuple[Heads, Heads, Heads]:
    """Gradients of queries, keys and values in `dtype`.

    Args:
      query, key, value, marks, interpret: as in `forward`; they may be a part of what each query read.
      logsumexp: of all that each query read.
      delta: sums of the products of all outputs and their gradients.
      gradient: of the outputs.
      softcap: as in `Context`.
    """
    length, num_keys, widths = query.shape[2], key.shape[2], (query.shape[3], value.shape[3])
    tall, wide = blocks_of(length), blocks_of(num_keys)
    marks = with_padding(marks, tall.padded, wide.padded)
    blocks = visible_blocks(marks, tall.size, wide.size)
    query, gradient = _tiled(query, tall.padded), _tiled(gradient.astype(query.dtype), tall.padded)
    key, value = _tiled(key, wide.padded), _tiled(value, wide.padded)
    rows = [padded(x, tall.padded, axis=2)[:, :, None] for x in (logsumexp, delta)]
    given = query, key, value, gradient, *rows, _rows(marks.query), _columns(marks.key)
    settings = tall.size, wide.size, interpret, dtype, softcap
    of_query = _of_queries(given, blocks, *settings)
    of_key, of_value = _of_keys(given, blocks, *settings)
    return (
        of_query[:, :, :length, : widths[0]],
        of_key[:, :, :num_keys, : widths[0]],
        of_value[:, :, :num_keys, : widths[1]],
    )


def _given_specs(given, tall, wide, of_query, of_key, of_row) -> list[pl.BlockSpec]:
    """Blocks of what both backward kernels read: query, key, value, gradient, logsumexp and delta."""
    query, key, value = given[:3]
    return [
        pl.BlockSpec((1, 1, tall, query.shape[3]), of_query),
        pl.BlockSpec((1, 1, wide, key.shape[3]), of_key),
        pl.BlockSpec((1, 1, wide, value.shape[3]), of_key),
        pl.BlockSpec((1, 1, tall, value.shape[3]), of_query),
        pl.BlockSpec((1, 1, 1, tall), of_row),
        pl.BlockSpec((1, 1, 1, tall), of_row),
    ]


def _of_queries(given, blocks, tall, wide, interpret, dtype, softcap):
    query, key = given[:2]
    group = query.shape[1] // key.shape[1]
    of_query = lambda b, h, i, j, fetched: (b, h, i, 0)  # noqa: E731
    of_key = lambda b, h, i, j, fetched: (b, lax.div(h, group), lax.max(fetched[b, i, j], 0), 0)  # noqa: E731
    of_row = lambda b, h, i, j, fetched: (b, h, 0, i)  # noqa: E731
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(*query.shape[:2], *blocks.shape[1:]),
        in_specs=[
            *_given_specs(given, tall, wide, of_query, of_key, of_row),
            pl.BlockSpec((1, _ROWS, tall), lambda b, h, i, j, fetched: (b, 0, i)),
            pl.BlockSpec((1, wide, _ROWS), lambda b, h, i, j, fetched: (b, lax.max(fetched[b, i, j], 0), 0)),
        ],
        out_specs=pl.BlockSpec((1, 1, tall, query.shape[3]), of_query),
        scratch_shapes=[pltpu.VMEM((tall, query.shape[3]), jnp.float32)],
    )
    return pl.pallas_call(
        functools.partial(_query_kernel, softcap),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct(query.shape, dtype),
        compiler_params=_parallel(),
        interpret=interpret,
        name="flash_backward_queries",
    )(_fetched(blocks), *given)


def _query_kernel(softcap, fetched, query, key, value, gradient, logsumexp, delta, of_query, of_key, out, total):
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        total[...] = jnp.zeros(total.shape, jnp.float32)

    @pl.when(fetched[b, i, j] == j)
    def _():
        _, error = _weights_and_error(query, key, value, gradient, logsumexp, delta, of_query, of_key, softcap)
        total[...] += lax.dot_general(error.astype(key.dtype), key[0, 0], _TN, preferred_element_type=jnp.float32)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        out[0, 0] = total[...].astype(out.dtype)


def _of_keys(given, blocks, tall, wide, interpret, dtype, softcap):
    query, key, value = given[:3]
    group, count = query.shape[1] // key.shape[1], blocks.shape[1]  # the last axis of the grid is both

    def block(b, j, n, fetched):
        return lax.max(fetched[b, j, lax.rem(n, count)], 0)

    of_query = lambda b, k, j, n, fetched: (b, k * group + lax.div(n, count), block(b, j, n, fetched), 0)  # noqa: E731
    of_key = lambda b, k, j, n, fetched: (b, k, j, 0)  # noqa: E731
    of_row = lambda b, k, j, n, fetched: (b, k * group + lax.div(n, count), 0, block(b, j, n, fetched))  # noqa: E731
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(*key.shape[:2], blocks.shape[2], group * count),
        in_specs=[
            *_given_specs(given, tall, wide, of_query, of_key, of_row),
            pl.BlockSpec((1, _ROWS, tall), lambda b, k, j, n, fetched: (b, 0, block(b, j, n, fetched))),
            pl.BlockSpec((1, wide, _ROWS), lambda b, k, j, n, fetched: (b, j, 0)),
        ],
        out_specs=[
            pl.BlockSpec((1, 1, wide, key.shape[3]), of_key),
            pl.BlockSpec((1, 1, wide, value.shape[3]), of_key),
        ],
        scratch_shapes=[pltpu.VMEM((wide, x.shape[3]), jnp.float32) for x in (key, value)],
    )
    return pl.pallas_call(
        functools.partial(_key_kernel, count, softcap),
        grid_spec=grid_spec,
        out_shape=[jax.ShapeDtypeStruct(x.shape, dtype) for x in (key, value)],
        compiler_params=_parallel(),
        interpret=interpret,
        name="flash_backward_keys",
    )(_fetched(blocks.swapaxes(1, 2)), *given)


def _key_kernel(
    count,
    softcap,
    fetched,
    query,
    key,
    value,
    gradient,
    logsumexp,
    delta,
    of_query,
    of_key,
    to_key,
    to_value,
    keys,
    values,
):
    b, j, n = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(n == 0)
    def _():
        keys[...] = jnp.zeros(keys.shape, jnp.float32)
        values[...] = jnp.zeros(values.shape, jnp.float32)

    @pl.when(fetched[b, j, lax.rem(n, count)] == lax.rem(n, count))
    def _():
        weights, error = _weights_and_error(query, key, value, gradient, logsumexp, delta, of_query, of_key, softcap)
        dot = functools.partial(lax.dot, preferred_element_type=jnp.float32)
        values[...] += dot(weights.astype(gradient.dtype), gradient[0, 0])
        keys[...] += dot(error.astype(query.dtype), query[0, 0])

    @pl.when(n == pl.num_programs(3) - 1)
    def _():
        to_key[0, 0] = keys[...].astype(to_key.dtype)
        to_value[0, 0] = values[...].astype(to_value.dtype)


def _weights_and_error(query, key, value, gradient, logsumexp, delta, of_query, of_key, softcap):
    """The weights, and the gradient of the logits before `softcap`, both [keys, queries]."""
    logits = capped(lax.dot_general(key[0, 0], query[0, 0], _NT, preferred_element_type=jnp.float32), softcap)
    queries, keys = of_query[0], of_key[0]
    reads = visible(*(queries[n : n + 1] for n in range(4)), *(keys[:, n : n + 1] for n in range(4)))
    weights = jnp.where(reads, jnp.exp(logits - logsumexp[0, 0]), 0.0)
    of_weights = lax.dot_general(value[0, 0], gradient[0, 0], _NT, preferred_element_type=jnp.float32)
    return weights, weights * (of_weights - delta[0, 0]) * slope(logits, softcap)


def _tiled(x: Heads, length: int) -> Heads:
    return padded(widened(x), length, axis=2)


def _rows(marks: Int[Array, "B 4 T"]) -> Int[Array, "B 8 T"]:
    return padded(marks, _ROWS, axis=1)


def _columns(marks: Int[Array, "B 4 T"]) -> Int[Array, "B T 8"]:
    return _rows(marks).swapaxes(1, 2)


def _fetched(blocks: Array) -> Int[Array, "B tall wide"]:
    """The block that is in memory at every step, so that nothing is loaded for a step without work.

    It is the step's own where that is read, else the last one before it, or the first; -1 where none is read.
    """
    index = jnp.arange(blocks.shape[2])[None, None]
    before = lax.cummax(jnp.where(blocks, index, -1), axis=2)
    first = jnp.argmax(blocks, axis=2, keepdims=True)
    found = jnp.where(before < 0, first, before)
    return jnp.where(blocks.any(axis=2, keepdims=True), found, -1).astype(jnp.int32)


def _parallel() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))

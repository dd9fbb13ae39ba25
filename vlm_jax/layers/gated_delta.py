"""Gated DeltaNet: a token mixer with a short convolution, and a state of fixed size in place of keys and values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.layers.attention import Context
from vlm_jax.layers.attention.partition import context_shards
from vlm_jax.layers.delta_rule import Lineages, chunked, step
from vlm_jax.layers.dense import KERNEL_INIT, Dense, with_axes
from vlm_jax.layers.mlp import ACTIVATIONS
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.per_layer import joined
from vlm_jax.types import PADDING_SEGMENT, Dtype

_EPSILON = 1e-6  # of the unit length of queries and keys


class DeltaState(NamedTuple):
    """What one Gated DeltaNet layer keeps of earlier tokens, or all with a leading layer axis; it does not grow.

    Attributes:
      query, key, value: inputs of the convolutions at the last W tokens; zeros for those of an earlier segment, and
        where there are fewer.
      memory: of the delta rule, float32.
      segment: segment of these tokens, 0 where there are none.
    """

    query: Float[Array, "*L B W C"]
    key: Float[Array, "*L B W C"]
    value: Float[Array, "*L B W E"]
    memory: Float[Array, "*L B H K V"]
    segment: Int[Array, "*L B"]

    AXES = (
        (axes.LAYERS, axes.BATCH, None, axes.KV_HEADS),
        (axes.LAYERS, axes.BATCH, None, axes.KV_HEADS),
        (axes.LAYERS, axes.BATCH, None, axes.HEADS),
        (axes.LAYERS, axes.BATCH, axes.HEADS, None, None),
        (axes.LAYERS, axes.BATCH),
    )  # of all layers
    SLOTS = (None,) * 5  # no axis of positions: what is written replaces what was there

    def part(self, start: int, stop: int | None) -> "DeltaState":
        """What layers `start` to `stop` - 1 keep."""
        return DeltaState(*(leaf[start:stop] for leaf in self))

    def joined(self, other: "DeltaState") -> "DeltaState":
        """These layers followed by those of `other`."""
        return DeltaState(*map(joined, self, other))


class GatedDelta(nn.Module):
    """Linear attention by the gated delta rule; the output is normalised per head and gated by SiLU.

    Queries, keys and values pass a causal depthwise convolution and an activation; queries and keys then have unit
    length. A token reads the tokens that it would attend to in causal attention, by segments and branches. Padding
    changes nothing, wherever it is in a row.

    Attributes:
      num_key_heads: heads of queries and keys.
      num_value_heads: heads of values, decays and rates; a multiple of num_key_heads.
      key_dim, value_dim: widths of a head.
      window: tokens that the convolution reads, its own included.
      activation: after the convolution, a name of `layers.mlp.ACTIVATIONS`.
      norm_epsilon: of the norm of the output.
      dtype: dtype of the products; those of the delta rule are float32.
      param_dtype: dtype of the stored parameters.

    Source: Yang et al. 2025 (Gated DeltaNet), section 3.4; transformers, models/qwen3_next and models/qwen3_5.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    window: int = 4
    activation: str = "silu"
    norm_epsilon: float = 1e-6
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def empty(self, depth: int, batch_size: int, dtype: Dtype) -> DeltaState:
        """What `depth` layers keep before the first token."""
        rows, heads = (depth, batch_size), (self.num_value_heads, self.key_dim, self.value_dim)
        widths = (self.num_key_heads * self.key_dim,) * 2 + (self.num_value_heads * self.value_dim,)
        query, key, value = (jnp.zeros((*rows, self.window - 1, width), dtype) for width in widths)
        return DeltaState(query, key, value, jnp.zeros((*rows, *heads), jnp.float32), jnp.zeros(rows, jnp.int32))

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, *, cache: DeltaState | None = None
    ) -> tuple[Float[Array, "B T D"], DeltaState | None]:
        """Mixes `x` after what the cache keeps; reads segments and branches of `context`.

        Returns:
          The output, and with a cache what to keep after `x`.

        Raises:
          ValueError: heads of keys that do not divide those of values, groups of positions that read each other, or a
            mesh that divides sequences.
        """
        self._check(context)
        batch, length, width = x.shape
        segments = jnp.ones((batch, length), jnp.int32) if context.query_segments is None else context.query_segments
        order = jnp.argsort(segments == PADDING_SEGMENT, axis=1, stable=True)  # padding comes last
        segments = jnp.take_along_axis(segments, order, axis=1)
        branches = context.branches
        branches = None if branches is None else jnp.take_along_axis(branches, order, axis=1)
        x = _moved(x, order)
        held = jax.tree.map(lambda leaf: leaf[0], self.empty(1, batch, self.dtype)) if cache is None else cache
        lineages = Lineages.of(segments, held.segment, branches)
        query, key, value, tails = self._convolved(x, segments, held, lineages)
        rate, decay = self._rates(x, segments)
        if cache is not None and length == 1:
            mixed, memory = step(query, key, value, rate, decay, cache.memory, lineages)
        else:
            mixed, memory = chunked(query, key, value, rate, decay, held.memory, lineages)
        out = _moved(self._out(mixed, x, width), jnp.argsort(order, axis=1))
        if cache is None:
            return out, None
        count = jnp.sum(segments != PADDING_SEGMENT, axis=1)
        last = jnp.take_along_axis(segments, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        return out, DeltaState(tails[0], tails[1], tails[2], memory, jnp.where(count == 0, held.segment, last))

    def _check(self, context: Context) -> None:
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"gated delta layers: {self.num_key_heads} heads of keys do not divide {self.num_value_heads} of values"
            )
        if context.groups is not None:
            raise ValueError(
                "gated delta layers: expected no group_ids, since a token of the delta rule reads only earlier ones, "
                "got groups of positions that read each other; leave group_ids None"
            )
        shards = context_shards()
        if shards.size > 1:
            raise ValueError(
                f"gated delta layers: expected a mesh whose axis {shards.axis} is 1, since their state is not passed "
                f"on between parts of a sequence, got {shards.size}; use the devices for another axis"
            )

    def _convolved(
        self, x: Float[Array, "B T D"], segments: Int[Array, "B T"], held: DeltaState, lineages: Lineages
    ) -> tuple[jax.Array, jax.Array, jax.Array, list[jax.Array]]:
        """Queries, keys and values in float32, and the inputs at the last tokens in the dtypes of `held`."""
        past = self.window - 1
        of_inputs = jnp.concatenate([jnp.broadcast_to(held.segment[:, None], (x.shape[0], past)), segments], axis=1)
        count = jnp.sum(segments != PADDING_SEGMENT, axis=1)
        last = count[:, None] + jnp.arange(past)[None]
        kept = jnp.take_along_axis(of_inputs, last, axis=1)
        last, kept = last[..., None], (kept == kept[:, -1:])[..., None]  # the segment of the last token
        earlier = None if lineages.branches is None else lineages.earlier(past)
        found, tails = [], []
        for name, tail in (("query", held.query), ("key", held.key), ("value", held.value)):
            heads, dim, axis = self._sizes(name)
            inputs = self._dense(heads * dim, axis, name)(x)
            inputs = jnp.concatenate([tail.astype(inputs.dtype), inputs], axis=1)
            tails.append(jnp.where(kept, jnp.take_along_axis(inputs, last, axis=1), 0).astype(tail.dtype))
            init = with_axes(KERNEL_INIT, axes.PATCH, axis)
            kernel = self.param(f"{name}_conv", init, (self.window, heads * dim), self.param_dtype).astype(self.dtype)
            mixed = jnp.zeros((*x.shape[:2], heads * dim), jnp.float32)
            for place in range(self.window):
                if earlier is None or place == past:
                    same = of_inputs[:, place : place + x.shape[1]] == segments
                    part = inputs[:, place : place + x.shape[1]]
                else:
                    same = earlier[place] >= 0
                    part = jnp.take_along_axis(inputs, (past + earlier[place])[..., None], axis=1)
                part = jnp.where(same[..., None], part, 0)
                mixed += part.astype(jnp.float32) * kernel[place].astype(jnp.float32)[None, None]
            found.append(ACTIVATIONS[self.activation](mixed).reshape(*x.shape[:2], heads, dim))
        query, key, value = found
        return _unit(query) * self.key_dim**-0.5, _unit(key), value, tails

    def _rates(
        self, x: Float[Array, "B T D"], segments: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
        """Rates and log decays, 0 for padding."""
        shape = (self.num_value_heads,)
        scale = self.param("decay_log", with_axes(_decay_init, axes.HEADS), shape, self.param_dtype)
        bias = self.param("decay_bias", with_axes(nn.initializers.ones, axes.HEADS), shape, self.param_dtype)
        rate, steps = (self._dense(*shape, axes.HEADS, name)(x).astype(jnp.float32) for name in ("rate", "decay"))
        scale, bias = (leaf.astype(jnp.float32)[None, None] for leaf in (scale, bias))
        real = (segments != PADDING_SEGMENT)[..., None].astype(jnp.float32)
        return real * jax.nn.sigmoid(rate), -real * jnp.exp(scale) * jax.nn.softplus(steps + bias)

    def _out(self, mixed: Float[Array, "B T H V"], x: Float[Array, "B T D"], width: int) -> Float[Array, "B T D"]:
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mixed = Norm("rms", self.norm_epsilon, axes.HEAD_DIM, name="norm", **settings)(mixed)
        gate = self._dense(self.num_value_heads * self.value_dim, axes.HEADS, "gate")(x)
        mixed = mixed.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32)).reshape(mixed.shape)
        mixed = mixed.astype(self.dtype).reshape(*x.shape[:2], -1)
        return Dense(width, (axes.HEADS, axes.EMBED), use_bias=False, name="out", **settings)(mixed)

    def _dense(self, features: int, axis: str, name: str) -> Dense:
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Dense(features, (axes.EMBED, axis), use_bias=False, name=name, **settings)

    def _sizes(self, name: str) -> tuple[int, int, str]:
        """Heads, width of a head and name of their axis."""
        if name == "value":
            return self.num_value_heads, self.value_dim, axes.HEADS
        return self.num_key_heads, self.key_dim, axes.KV_HEADS


def _decay_init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
    """Log of factors uniform in 0.01 to 16. Source: transformers, models/qwen3_next, Qwen3NextGatedDeltaNet."""
    return jnp.log(jax.random.uniform(key, shape, minval=0.01, maxval=16.0)).astype(dtype)


def _unit(x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _EPSILON)


def _moved(x: Float[Array, "B T D"], order: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The positions in another order; nothing is moved where it is theirs."""
    if x.shape[1] == 1:
        return x
    moves = jnp.any(order != jnp.arange(x.shape[1])[None])
    return jax.lax.cond(moves, lambda x: jnp.take_along_axis(x, order[..., None], axis=1), lambda x: x, x)

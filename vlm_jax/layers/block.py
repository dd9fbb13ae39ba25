"""The transformer block, and a stack of it that is scanned over depth."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlm_jax import axes
from vlm_jax.layers.attention import HEADS, Context, MultiHeadAttention, SharedKeyValue
from vlm_jax.layers.dense import with_axes
from vlm_jax.layers.experts_beside import ExpertsBeside
from vlm_jax.layers.gated_delta import GatedDelta
from vlm_jax.layers.latent_attention import LatentAttention
from vlm_jax.layers.layer_input import GatedInput
from vlm_jax.layers.mlp import Mlp
from vlm_jax.layers.moe import MixtureOfExperts
from vlm_jax.layers.norm import Norm, NormKind
from vlm_jax.layers.per_layer import has_per_layer, in_sequence, of_layers, stacked
from vlm_jax.layers.saliency import Heads
from vlm_jax.layers.scan import scan_layers
from vlm_jax.types import Config, Dtype, Fields, Params, Tree

LayerCache = Tree  # a `KeyValue` or another kind of `decoders.cache`, of one layer, or of all with a leading layer axis

RematPolicy = Literal["none", "full", "dots"]

REMAT_POLICIES: Fields = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
      num_heads, num_kv_heads, head_dim, qk_norm, qk_norm_over, qk_scale, value_norm, value_is_key, shares_keys: as in
        `MultiHeadAttention`.
      gated_attention: `gated` of it.
      clips: `clips` of the linear layers of attention and feed-forward; see `Dense`.
      mlp_dim: hidden width of the feed-forward.
      activation, gated: as in `Mlp`.
      norm: kind of all norms.
      post_norm: a norm of the attention's and of the feed-forward's output too, before it is added to x.
      norm_epsilon: epsilon of every norm.
      qkv_bias: biases on query, key and value.
      key_bias: a bias on the key; `qkv_bias` when None.
      use_bias: biases on the other linear layers.
      mlp_bias: biases on the linear layers of the feed-forward; `use_bias` when None.
      layer_scale: initial value of a learned factor per channel of what is added to x; None for no factors.
      own_input_dim: channels of an input of the block's own, whose `GatedInput`, normalised, is added; None for none.
      output_scale: a factor of the block's output, which is stored and not learned.
      latent: arguments of a `LatentAttention` in place of the `MultiHeadAttention`, or None.
      delta: arguments of a `GatedDelta` in place of the `MultiHeadAttention`, or None.
      experts: arguments of a `MixtureOfExperts` in place of the `Mlp`, or None.
      experts_beside: arguments of an `ExpertsBeside`, whose output is added to the `Mlp`'s, which then has a norm of
        its own; both read x. None for none.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Source: Dosovitskiy et al. 2021, eq. 2 and 3; Touvron et al. 2023 with RMSNorm and SwiGLU;
    Touvron et al. 2021 (CaiT), eq. 4, for layer scale; Gemma Team 2024 (Gemma 2), section 2, for norms of outputs.
    """

    num_heads: int
    mlp_dim: int
    activation: str
    norm: NormKind
    norm_epsilon: float
    num_kv_heads: int | None = None
    head_dim: int | None = None
    gated: bool = False
    qkv_bias: bool = True
    key_bias: bool | None = None
    use_bias: bool = True
    mlp_bias: bool | None = None
    qk_norm: NormKind | None = None
    qk_norm_over: Literal["head", "width"] = "head"
    qk_scale: float | None = None
    value_norm: bool = False
    value_is_key: bool = False
    shares_keys: bool = False
    clips: bool = False
    post_norm: bool = False
    layer_scale: float | None = None
    own_input_dim: int | None = None
    output_scale: bool = False
    gated_attention: bool = False
    latent: Config | None = None
    delta: Config | None = None
    experts: Config | None = None
    experts_beside: Config | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache | None,
        context: Context,
        half: Literal["both", "attention", "feed_forward"] = "both",
        own_input: Float[Array, "B T P"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the output (with `half`, of one of the two steps only) and the values to write to the cache.

        `cache` is a `SharedKeyValue` for a block with `shares_keys`, `own_input` that of one with `own_input_dim`.
        """
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = {"kind": self.norm, "epsilon": self.norm_epsilon, **settings}
        if half != "feed_forward":
            attend = self._attention(settings)
            attended, cache = attend(Norm(name="attention_norm", **norm)(x), context, cache=cache)
            if self.post_norm:
                attended = Norm(name="attention_post_norm", **norm)(attended)
            x = x + self._scaled(attended, "attention_scale")
        if half != "attention":
            mlp = self._feed_forward(settings)
            out = mlp(Norm(name="mlp_norm", **norm)(x))
            if self.experts_beside is not None:
                shared = {"activation": self.activation, "norm": self.norm, "norm_epsilon": self.norm_epsilon}
                beside = ExpertsBeside(name="experts_beside", **shared, **self.experts_beside, **settings)
                out = Norm(name="mlp_own_norm", **norm)(out) + beside(x)
            if self.post_norm:
                out = Norm(name="mlp_post_norm", **norm)(out)
            x = x + self._scaled(out, "mlp_scale")
            if self.own_input_dim is not None:
                gated = GatedInput(self.own_input_dim, self.activation, name="own_input", **settings)
                x = x + Norm(name="own_input_norm", **norm)(gated(x, own_input))
            if self.output_scale:
                factor = self.param("output_scale", with_axes(nn.initializers.ones, axes.NORM), (1,), self.param_dtype)
                x = x * jax.lax.stop_gradient(factor).astype(self.dtype)[None, None]
        return nn.with_logical_constraint(x, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED)), cache

    def _attention(self, settings: Fields) -> GatedDelta | LatentAttention | MultiHeadAttention:
        if self.delta is not None:
            return GatedDelta(name="delta", norm_epsilon=self.norm_epsilon, **self.delta, **settings)
        if self.latent is not None:
            return LatentAttention(num_heads=self.num_heads, name="attention", **self.latent, **settings)
        return MultiHeadAttention(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            use_bias=self.qkv_bias,
            key_bias=self.key_bias,
            out_bias=self.use_bias,
            qk_norm=self.qk_norm,
            qk_norm_over=self.qk_norm_over,
            qk_scale=self.qk_scale,
            value_norm=self.value_norm,
            value_is_key=self.value_is_key,
            shares_keys=self.shares_keys,
            gated=self.gated_attention,
            clips=self.clips,
            norm_epsilon=self.norm_epsilon,
            name="attention",
            **settings,
        )

    def _feed_forward(self, settings: Fields) -> MixtureOfExperts | Mlp:
        if self.experts is not None:
            return MixtureOfExperts(activation=self.activation, name="mlp", **self.experts, **settings)
        bias = self.use_bias if self.mlp_bias is None else self.mlp_bias
        clips = {"use_bias": bias, "clips": self.clips}
        return Mlp(self.mlp_dim, self.activation, gated=self.gated, name="mlp", **clips, **settings)

    def _scaled(self, x: Float[Array, "B T D"], name: str) -> Float[Array, "B T D"]:
        if self.layer_scale is None:
            return x
        init = with_axes(nn.initializers.constant(self.layer_scale), axes.NORM)
        return x * self.param(name, init, x.shape[-1:], self.param_dtype).astype(self.dtype)[None, None]


def with_level(x: Float[Array, "B T D"], levels: Float[Array, "B T F"] | None, index: Any) -> Float[Array, "B T D"]:
    """The output of block `index` with what `levels` adds to it.

    Args:
      x: the output.
      levels: D channels for each of the first blocks, concatenated; None for no addition.
      index: number of the block.
    """
    if levels is None:
        return x
    width = x.shape[-1]
    count = levels.shape[-1] // width
    own = jax.lax.dynamic_slice_in_dim(levels, jnp.minimum(index, count - 1) * width, width, axis=-1)
    return x + jnp.where(index < count, own, 0).astype(x.dtype)


class _Own(NamedTuple):
    """What differs between blocks of a stack beside their parameters: of one block, or of all with a layer axis.

    Attributes:
      window: of attention, in positions; None where no block has one.
      rope: index of the rotary angles among those of the context; None where there is one rope.
    """

    window: Int[Array, "*L"] | None
    rope: Int[Array, "*L"] | None

    def context(self, context: Context, num_ropes: int) -> Context:
        """A block's context."""
        if self.window is not None:
            context = dataclasses.replace(context, window=self.window)
        if self.rope is None or context.angles is None:
            return context
        half = context.angles.shape[-1] // num_ropes
        angles = jax.lax.dynamic_slice_in_dim(context.angles, self.rope * half, half, axis=-1)
        return dataclasses.replace(context, angles=angles)


class _ScannedBlock(TransformerBlock):
    """A block in the form that `nn.scan` needs; also returns its input with `collect`."""

    collect: bool = False
    num_ropes: int = 1

    @nn.compact
    def __call__(self, x, cache, own, index, own_input, levels, context):  # type: ignore[override]
        y, cache = super().__call__(x, cache, own.context(context, self.num_ropes), own_input=own_input)
        return with_level(y, levels, index), (cache, x if self.collect else None)


class TransformerStack(nn.Module):
    """`depth` blocks, scanned: parameters have a leading layer axis, and compile time does not grow with the depth.

    To change the tokens between blocks, `run` runs some of the blocks, and `attend` and `feed_forward`
    run the halves of one block, with slices of the same parameters.

    Attributes:
      depth: number of blocks.
      remat: what is stored for the backward pass. `none`: all but attention weights and intermediates of
        norms and activations, which are recomputed; `dots`: the outputs of the linear layers
        and the inputs of the blocks; `full`: the inputs of the blocks.
      unroll: blocks per loop iteration; `depth` unrolls fully.
      block: keyword arguments of `TransformerBlock`.
      windows: attention window of each block in positions, or None; empty where no block has one.
      ropes: index of each block's rotary angles among those of the context; empty where all have the same.
    """

    depth: int
    block: Config
    remat: RematPolicy = "none"
    unroll: int = 1
    windows: tuple[int | None, ...] = ()
    ropes: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        *,
        cache: LayerCache | None = None,
        collect: bool = False,
        levels: Float[Array, "B T F"] | None = None,
        own_inputs: Float[Array, "B T L P"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, Float[Array, "L B T D"] | None]:
        """Returns the last output, the values to write to the cache, and, with `collect`, [depth + 1, B, T, D].

        The collected states are the input of every block and the output of the last. `levels` are added to the outputs
        of the first blocks; see `with_level`. `own_inputs` are those of every block, where blocks have such.
        """
        if not self.is_initializing() and has_per_layer(self.variables["params"]["layers"]):
            return *self.run(x, context, 0, self.depth, cache=cache, levels=levels, own_inputs=own_inputs), None
        block = _ScannedBlock
        if self.remat != "none":
            policy = REMAT_POLICIES[self.remat]
            block = nn.remat(block, policy=policy, prevent_cse=False)
        scanned = scan_layers(block, self.depth, in_axes=(0, 0, 0, 0, nn.broadcast, nn.broadcast), unroll=self.unroll)
        index = None if levels is None else jnp.arange(self.depth)
        layers = scanned(collect=collect, num_ropes=self._num_ropes, name="layers", **self.block)
        given = None if own_inputs is None else jnp.moveaxis(own_inputs, 2, 0)
        x, (cache, inputs) = layers(x, cache, self.own(0, self.depth), index, given, levels, context)
        return x, cache, jnp.concatenate([cast(jax.Array, inputs), x[None]]) if collect else None

    def run(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        start: int,
        stop: int,
        *,
        cache: LayerCache | None = None,
        levels: Float[Array, "B T F"] | None = None,
        own_inputs: Float[Array, "B T L P"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Runs blocks `start` to `stop` - 1; `cache`, the values to write to it and `own_inputs` are of these only.

        `levels` begin with what is added to block `start`. Without blocks there is nothing to write.
        """
        part = Part(self, context, start, cache)
        x, (cache,) = in_turn([part], stop - start, x, levels, own_inputs, indexed=cache is not None)
        return x, cache

    def attend(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        index: int,
        *,
        cache: LayerCache | SharedKeyValue | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, Heads]:
        """x + attention(norm(x)) of block `index`, the values to write to its cache, and its queries and keys."""
        params = self.layers_of(x)
        own = of_layers(params, index)
        cache = cache if isinstance(cache, SharedKeyValue) else of_layers(cache, 0)
        context = self.context_of(index, context)
        run = self._rematted(lambda p, x, cache: self._apply(p, x, cache, context, half="attention", mutable=[HEADS]))
        (x, cache), sown = run(own, x, cache)
        cache = stacked(cache) if has_per_layer(params) else jax.tree.map(lambda leaf: leaf[None], cache)
        heads = sown[HEADS]["attention"]
        return x, cache, Heads(heads["queries"], heads["keys"])

    def feed_forward(
        self,
        x: Float[Array, "B T D"],
        index: int,
        *,
        levels: Float[Array, "B T F"] | None = None,
        own_input: Float[Array, "B T P"] | None = None,
    ) -> Float[Array, "B T D"]:
        """x + mlp(norm(x)) of block `index`, with what its own input and `levels` add, which begin with it."""

        def half(params: Params, x: jax.Array, given: jax.Array | None) -> jax.Array:
            out, _ = self._apply(params, x, None, Context("full"), half="feed_forward", own_input=given)
            return out[0]

        own = of_layers(self.layers_of(x), index)
        return with_level(self._rematted(half)(own, x, own_input), levels, 0)

    def context_of(self, index: int, context: Context) -> Context:
        """The context of block `index`, with the block's own window and rotary angles."""
        own = jax.tree.map(lambda leaf: leaf[0], self.own(index, index + 1))
        return own.context(context, self._num_ropes)

    @property
    def _num_ropes(self) -> int:
        return max(self.ropes, default=0) + 1

    def own(self, start: int, stop: int) -> _Own:
        """The windows and ropes of blocks `start` to `stop` - 1."""
        for name, given in (("windows", self.windows), ("ropes", self.ropes)):
            if given and len(given) != self.depth:
                raise ValueError(f"{name}: expected one for each of {self.depth} blocks, got {len(given)}")
        endless = np.iinfo(np.int32).max
        windows = [endless if window is None else window for window in self.windows[start:stop]]
        found = (jnp.asarray(given, jnp.int32) if given else None for given in (windows, self.ropes[start:stop]))
        return _Own(*found)

    def block_of(
        self,
        params: Params,
        x: Float[Array, "B T D"],
        past: LayerCache | SharedKeyValue | None,
        own: _Own,
        context: Context,
        own_input: Float[Array, "B T P"] | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Runs one block with its parameters, cache, and what `own` says of it."""
        own_context = own.context(context, self._num_ropes)
        run = self._rematted(lambda p, x, past, given: self._apply(p, x, past, own_context, own_input=given)[0])
        return run(params, x, past, own_input)

    def layers_of(self, x: jax.Array) -> Params:
        """The stacked parameters; at initialisation they are sampled as usual."""
        if self.is_initializing() and not self.has_variable("params", "layers"):
            self(x[:, :1], Context("causal"))  # which windows need
        return nn.meta.unbox(self.variables["params"]["layers"])

    def _apply(self, params: Params, *args: Tree, mutable: Sequence[str] = (), **kwargs: Any) -> Tree:
        return TransformerBlock(**self.block, parent=None).apply({"params": params}, *args, mutable=mutable, **kwargs)

    def _rematted(self, function: Callable[..., Tree]) -> Callable[..., Tree]:
        if self.remat == "none":
            return function
        return jax.checkpoint(function, policy=REMAT_POLICIES[self.remat], prevent_cse=False)


class Part(NamedTuple):
    """Blocks of one stack that `in_turn` runs.

    Attributes:
      stack: their stack.
      context: the context of its blocks.
      start: index in the stack of the first of them.
      cache: of consecutive blocks of the stack, among which they are; None for none.
      skip: blocks of the cache before the first of them.
      shared: keys and values that all of them read; None for their own.
    """

    stack: TransformerStack
    context: Context
    start: int
    cache: LayerCache | None
    skip: int = 0
    shared: SharedKeyValue | None = None


def in_turn(
    parts: Sequence[Part],
    repeats: int,
    x: Float[Array, "B T D"],
    levels: Float[Array, "B T F"] | None = None,
    own_inputs: Float[Array, "B T L P"] | None = None,
    *,
    indexed: bool,
) -> tuple[Float[Array, "B T D"], tuple[LayerCache | None, ...]]:
    """Runs one block of every part, in order, then the next block of every part, `repeats` times, as one scan.

    Args:
      parts: whose stacks may have blocks of different kinds.
      repeats: blocks of every part; without any there is nothing to write.
      x: the input of the first block.
      levels: begin with what is added to the first block; see `with_level`.
      own_inputs: of every block, in order, where blocks have such.
      indexed: whether blocks take their parameters and caches from the stacks by an index, as is best with a cache that
        is written, instead of from slices of the stacks.

    Returns:
      The output of the last block, and of every part the values to write to the cache of these blocks.
    """
    if repeats == 0:
        return x, (None,) * len(parts)
    params = tuple(part.stack.layers_of(x) for part in parts)
    kinds = tuple(part.stack.own(part.start, part.start + repeats) for part in parts)
    given = None
    if own_inputs is not None:
        by_part = own_inputs.reshape(*x.shape[:2], repeats, len(parts), -1)
        given = jnp.moveaxis(by_part, (2, 3), (0, 1))
    each = kinds, jnp.arange(repeats), given

    def layers(x: jax.Array, inputs: Tree) -> Tree:
        of_parts, past, (kinds, number, given) = inputs
        fresh = []
        for place, (part, own, held, kind) in enumerate(zip(parts, of_parts, past, kinds, strict=True)):
            held = held if part.shared is None else part.shared
            own_input = None if given is None else given[place]
            x, new = part.stack.block_of(own, x, held, kind, part.context, own_input)
            x = with_level(x, levels, number * len(parts) + place)
            fresh.append(new)
        return x, tuple(fresh)

    def indexed_layers(x: jax.Array, inputs: Tree) -> Tree:
        number = inputs[1]
        own = tuple(of_layers(of_part, part.start + number) for part, of_part in zip(parts, params, strict=True))
        past = tuple(of_layers(part.cache, part.skip + number) for part in parts)
        return layers(x, (own, past, inputs))

    def sliced(starts: Sequence[int], trees: Sequence[Tree]) -> tuple[Tree, ...]:
        return tuple(of_layers(tree, slice(first, first + repeats)) for first, tree in zip(starts, trees, strict=True))

    apart = has_per_layer(params)
    unroll = max(1, max(part.stack.unroll for part in parts) // len(parts))
    # A slice is a copy, which each generation step would repeat; but the gradient of an indexed
    # stack is a sum over layers of whole stacks, so training slices.
    if indexed and not apart:
        return jax.lax.scan(indexed_layers, x, each, unroll=unroll)
    past = sliced([part.skip for part in parts], [part.cache for part in parts])
    inputs = sliced([part.start for part in parts], params), past, each
    return in_sequence(layers, x, inputs, repeats) if apart else jax.lax.scan(layers, x, inputs, unroll=unroll)

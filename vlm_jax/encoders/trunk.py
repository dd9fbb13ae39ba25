"""Base of the plain vision transformers: blocks, norms, layer selection and pooling heads."""

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Shaped

from vlm_jax import axes
from vlm_jax.encoders.last_attention import run_with_saliency
from vlm_jax.layers.attention import Context
from vlm_jax.layers.block import RematPolicy, TransformerStack
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.mlp import Activation
from vlm_jax.layers.norm import Norm, NormKind
from vlm_jax.layers.pooling import MapHead, reduce_tokens
from vlm_jax.layers.saliency import Saliency
from vlm_jax.layers.token_merging import run_merging
from vlm_jax.ranges import Depth, Finite, Index, Natural, NonNegative, Size
from vlm_jax.types import Dtype, Grid, VisualFeatures

Pooling = Literal["none", "token", "gap", "token_gap", "max", "map"]


class Trunk(nn.Module, kw_only=True):
    """Encodes embedded patches to `VisualFeatures`; subclasses embed.

    Attributes:
      width: residual width.
      depth: number of blocks of the model.
      num_heads: attention heads.
      mlp_dim: hidden width of the feed-forward.
      activation: a name of `layers.mlp.ACTIVATIONS`.
      gated: feed-forwards with a second projection, as in SwiGLU.
      norm: kind of the blocks' norms and of the last one.
      norm_epsilon: epsilon of every norm.
      qkv_bias: biases on query, key and value.
      key_bias, use_bias, mlp_bias: of the blocks, as in `TransformerBlock`.
      qk_norm, qk_norm_over, layer_scale: as in `TransformerBlock`.
      pre_norm: a norm before the first block, as CLIP has.
      final_norm: the last norm applies to all `tokens`, to the `pooled` vector only (as in Hugging
        Face's CLIP), or is `none`.
      select_layer: the tokens are hidden state number `select_layer`, without the last
        norm: 0 is the input of the first block, -1 the output of the last, -2 that of the one
        before. Later blocks are not built: they have no parameters and cost nothing. None runs
        the whole model.
      levels: hidden states, numbered as in `select_layer`, to concatenate in
        `VisualFeatures.levels`, for connectors that read several; empty for none.
      keep_class_token: whether the returned tokens start with the class token. Registers are never returned.
      pooling: how an image gets one vector: its first `token` (the class token where there is
        one), the mean (`gap`) or `max` of its patches, the first two joined (`token_gap`), attention pooling
        (`map`), or `none`.
      representation_size: width of a linear layer with tanh after the pooling, or None. Without
        pooling it is applied to every token.
      projection_dim: width of a linear layer after that, or None.
      projection_bias: a bias on the projection.
      saliency: also returns the attention that features get in the last built block:
        averaged over its `heads`, or of all heads `joined` into one; from the class token, or averaged over the
        tokens of the same image where there is none. For reducers; `build` sets it.
      merged: tokens to merge in each block, for the reducer ToMe; `build` sets it. Empty for no merging.
      merging: whether the remaining tokens are in order, or as in ToMe's release.
      remat, unroll: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.
    """

    width: Size
    depth: Depth
    num_heads: Size
    mlp_dim: Size
    activation: Activation = "gelu_tanh"
    gated: bool = False
    norm: NormKind = "layer"
    norm_epsilon: NonNegative = 1e-6
    qkv_bias: bool = True
    key_bias: bool | None = None
    use_bias: bool = True
    mlp_bias: bool | None = None
    qk_norm: NormKind | None = None
    qk_norm_over: Literal["head", "width"] = "head"
    layer_scale: Finite | None = None
    pre_norm: bool = False
    final_norm: Literal["tokens", "pooled", "none"] = "tokens"
    select_layer: Index | None = None
    levels: tuple[Index, ...] = ()
    keep_class_token: bool = False
    pooling: Pooling = "none"
    representation_size: Size | None = None
    projection_dim: Size | None = None
    projection_bias: bool = False
    saliency: Saliency = "none"
    merged: tuple[Natural, ...] = ()
    merging: Literal["exact", "as_released"] = "exact"
    remat: RematPolicy = "none"
    unroll: Depth = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @property
    def features(self) -> int:
        """Width D_v of the features."""
        if self.pooling == "none":
            return self.projection_dim or self.representation_size or self.width
        return self.width

    @property
    def num_blocks(self) -> int:
        """Number of blocks that are built: those up to `select_layer`.

        Raises:
          ValueError: there is no such hidden state, or the last norm or the pooling needs later blocks.
        """
        if self.select_layer is None:
            return self.depth
        if not -self.depth - 1 <= self.select_layer <= self.depth:
            raise ValueError(
                f"select_layer {self.select_layer}: {self.depth} blocks have the hidden states 0 to "
                f"{self.depth}, or {-self.depth - 1} to -1"
            )
        if self.pooling != "none" or self.representation_size or self.projection_dim:
            raise ValueError(
                "select_layer returns an unpooled hidden state; set pooling to 'none' and leave "
                "representation_size and projection_dim out"
            )
        return self.select_layer % (self.depth + 1)

    def encode(
        self,
        x: Float[Array, "B T D"],
        grid: Grid,
        segments: Int[Array, "B T"] | None,
        *,
        num_prefix: int,
        collect: bool,
        angles: Float[Array, "B T half"] | None = None,
    ) -> VisualFeatures:
        """Runs the blocks and the heads; to be called inside a subclass's compact `__call__`.

        Args:
          x: embedded tokens with positions added.
          grid: rows and columns of the patches.
          segments: 0 where a token is padding; tokens of one segment attend to each other. None where
            there is one segment.
          num_prefix: tokens before the patches: a class token and registers, or 0.
          collect: also returns every hidden state.
          angles: rotary angles of all tokens, 0 for those before the patches; None without rotary positions.
        """
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = {"kind": self.norm, "epsilon": self.norm_epsilon, **settings}
        if self.pre_norm:
            x = Norm(name="pre_norm", **norm)(x)
        x = nn.with_logical_constraint(x, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))
        block = {
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "activation": self.activation,
            "gated": self.gated,
            "norm": self.norm,
            "norm_epsilon": self.norm_epsilon,
            "qkv_bias": self.qkv_bias,
            "key_bias": self.key_bias,
            "use_bias": self.use_bias,
            "mlp_bias": self.mlp_bias,
            "qk_norm": self.qk_norm,
            "qk_norm_over": self.qk_norm_over,
            "layer_scale": self.layer_scale,
            **settings,
        }
        stack = TransformerStack(self.num_blocks, block, self.remat, self.unroll, name="blocks")
        hidden, saliency, keys, kept = x[None], None, None, None
        if self.merged or self.saliency != "none":
            self._check_looked_into(collect)
        if self.merged:
            released = self.merging == "as_released"
            tokens = run_merging(
                stack, x, segments, self.merged, num_prefix=num_prefix, released=released, angles=angles
            )
            x, segments, grid = tokens.x, tokens.segments, (1, tokens.x.shape[1] - num_prefix)
            kept = tokens.place[:, num_prefix:] - num_prefix
        elif self.saliency != "none":
            context = Context("full", segments, segments, angles=angles)
            x, saliency, keys = run_with_saliency(stack, x, context, self.saliency, class_token=num_prefix > 0)
            saliency, keys = self._returned(saliency, num_prefix), self._returned(keys, num_prefix)
        elif self.num_blocks:
            context = Context("full", segments, segments, angles=angles)
            x, _, hidden = stack(x, context, collect=collect or bool(self.levels))
        levels = [] if hidden is None else [hidden[i] for i in self._level_numbers()]
        mask = None if segments is None else segments > 0
        if self.final_norm == "tokens" and self.select_layer is None:
            x = Norm(name="final_norm", **norm)(x)
        pooled = self._pool(x, mask, num_prefix)
        if pooled is None:
            x = self._represent(x)
        else:
            pooled = self._represent(pooled)
        prefix_left = int(self.keep_class_token and num_prefix > 0)
        x, levels = self._returned(x, num_prefix), [self._returned(level, num_prefix) for level in levels]
        mask = None if mask is None else self._returned(mask, num_prefix)
        grid = (1, x.shape[1]) if prefix_left else grid
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        hidden = hidden if collect else None
        side_by_side = jnp.concatenate(levels, axis=-1) if levels else None
        return VisualFeatures(
            x,
            mask,
            grid,
            pooled=pooled,
            hidden=hidden,
            levels=side_by_side,
            saliency=saliency,
            keys=keys,
            kept=kept,
            num_prefix=prefix_left,
        )

    def _returned(self, leaf: Shaped[Array, "B T *rest"], num_prefix: int) -> Shaped[Array, "B N *rest"]:
        """What is returned of a value for every token: the patches', and the class token's where that is kept."""
        if not self.keep_class_token or not num_prefix:
            return leaf[:, num_prefix:]
        return leaf if num_prefix == 1 else jnp.concatenate([leaf[:, :1], leaf[:, num_prefix:]], axis=1)

    def _level_numbers(self) -> tuple[int, ...]:
        """The non-negative indices of the hidden states of `levels`.

        Raises:
          ValueError: a hidden state that does not exist or is not computed.
        """
        numbers = tuple(level % (self.depth + 1) for level in self.levels)
        wrong = [
            level
            for level, number in zip(self.levels, numbers, strict=True)
            if not -self.depth - 1 <= level <= self.depth or number > self.num_blocks
        ]
        if wrong:
            key = "select_layer" if self.num_blocks < self.depth else "depth"
            raise ValueError(
                f"levels {wrong}: {self.num_blocks} of {self.depth} blocks are built, with the hidden states 0 to "
                f"{self.num_blocks}; choose from these, or raise {key}"
            )
        return numbers

    def _check_looked_into(self, collect: bool) -> None:
        if collect or self.levels or (self.keep_class_token and self.merged) or not self.num_blocks:
            raise ValueError(
                "a reducer inside the encoder needs at least one block and, if it merges, patch features only: "
                "with `saliency` or `merged`, leave out `collect` and levels, with `merged` also keep_class_token, and "
                "select a later layer than 0"
            )

    def _pool(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None, num_prefix: int
    ) -> Float[Array, "B E"] | None:
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.pooling == "none":
            if self.final_norm == "pooled" and self.select_layer is None:
                raise ValueError("final_norm 'pooled' has nothing to normalise where pooling is 'none'")
            return None
        if self.pooling == "map":
            head = MapHead(self.num_heads, self.mlp_dim, self.activation, self.norm_epsilon, name="head", **settings)
            pooled = head(x, mask)
        elif self.pooling == "token":
            pooled = reduce_tokens(x, "first")
        else:
            patches = None if mask is None else mask[:, num_prefix:]
            pooled = reduce_tokens(x[:, num_prefix:], "max" if self.pooling == "max" else "mean", patches)
            if self.pooling == "token_gap":
                pooled = jnp.concatenate([reduce_tokens(x, "first"), pooled], axis=-1)
        if self.final_norm == "pooled":
            pooled = Norm(self.norm, self.norm_epsilon, name="final_norm", **settings)(pooled)
        return pooled

    def _represent(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = (axes.EMBED, axes.CLASSES)
        if self.representation_size is not None:
            x = jnp.tanh(Dense(self.representation_size, width, name="representation", **settings)(x))
        if self.projection_dim is not None:
            x = Dense(self.projection_dim, width, self.projection_bias, name="projection", **settings)(x)
        return x

"""Learned queries behind the features of an encoder, in blocks of a causal language model, as in DeepSeek-OCR 2."""

import math

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.encoders.encoder import ImageEncoder
from vlm_jax.layers.attention import Context
from vlm_jax.layers.block import RematPolicy, TransformerStack
from vlm_jax.layers.dense import with_axes
from vlm_jax.layers.mlp import Activation
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.rope import Rope
from vlm_jax.ranges import Depth, NonNegative, Size
from vlm_jax.types import Dtype, Grid, VisualFeatures

IMAGE_GROUP, NO_GROUP = 1, 0  # group ids of attention


class CausalQueries(nn.Module):
    """The outputs of learned queries, which follow the features of an encoder in a causal sequence.

    Features of the image attend to each other in both directions; a query attends to all of them, to the queries
    before it and to itself. So the order of the output is that of the queries, which the model learns, not the raster
    order of the image.

    Attributes:
      first: the encoder of the image; its width D_v is also that of the blocks.
      table_sizes: rows of each table of queries, fewest first. An image takes the first table with at least as many
        rows as `first` gives features, or the last.
      depth: number of blocks.
      num_heads: query heads of the blocks.
      num_kv_heads: key and value heads.
      mlp_dim: hidden width of the gated feed-forward.
      activation: a name of `layers.mlp.ACTIVATIONS`.
      rope: rotary positions of features and queries, counted through both.
      norm_epsilon: epsilon of every RMSNorm.
      remat, unroll: as in `TransformerStack`.
      dtype: dtype of the products.
      param_dtype: dtype of the stored parameters.

    Raises:
      ValueError: tables that are not in ascending order.

    Source: DeepSeek-OCR-2, deepencoderv2.py, Qwen2Decoder2Encoder; transformers, models/deepseek_ocr2.
    """

    first: ImageEncoder
    table_sizes: tuple[Size, ...]
    depth: Depth
    num_heads: Size
    num_kv_heads: Size
    mlp_dim: Size
    activation: Activation = "silu"
    rope: Rope = Rope()
    norm_epsilon: NonNegative = 1e-6
    remat: RematPolicy = "none"
    unroll: Depth = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @property
    def features(self) -> int:
        """Width D_v of the features."""
        return self.first.features

    @property
    def num_blocks(self) -> int:
        """None: the encoder of the image has its own."""
        return 0

    def table_of(self, count: int) -> int:
        """Index of the table of queries for `count` features of the image."""
        if not self.table_sizes or sorted(set(self.table_sizes)) != list(self.table_sizes):
            raise ValueError(f"table_sizes: expected numbers in ascending order, got {self.table_sizes}")
        return next((i for i, rows in enumerate(self.table_sizes) if count <= rows), len(self.table_sizes) - 1)

    def grid(self, height: int, width: int) -> Grid:
        """The queries for an image of `height` x `width` pixels, as a square, or as one row where they form none."""
        count = self.table_sizes[self.table_of(math.prod(self.first.grid(height, width)))]
        side = math.isqrt(count)
        return (side, side) if side * side == count else (1, count)

    @nn.compact
    def __call__(self, images: Float[Array, "B height width channels"]) -> VisualFeatures:
        """Encodes normalised pixels."""
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = self.first(images).tokens
        size, count, width = x.shape
        init = with_axes(nn.initializers.normal(1.0), axes.QUERY, axes.EMBED)
        tables = [
            self.param(f"queries_{number}", init, (rows, width), self.param_dtype)
            for number, rows in enumerate(self.table_sizes)
        ]
        queries = tables[self.table_of(count)].astype(self.dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(queries[None], (size, *queries.shape))], axis=1)
        x = nn.with_logical_constraint(x, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))
        places = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        context = Context(
            "causal",
            angles=self.rope.angles(places, width // self.num_heads),
            magnitude=self.rope.magnitude,
            groups=jnp.where(places < count, IMAGE_GROUP, NO_GROUP),
        )
        stack = TransformerStack(
            self.depth,
            {
                "num_heads": self.num_heads,
                "num_kv_heads": self.num_kv_heads,
                "mlp_dim": self.mlp_dim,
                "activation": self.activation,
                "gated": True,
                "norm": "rms",
                "norm_epsilon": self.norm_epsilon,
                "qkv_bias": True,
                "use_bias": False,
                **settings,
            },
            remat=self.remat,
            unroll=self.unroll,
            name="blocks",
        )
        x, *_ = stack(x, context)
        x = Norm("rms", self.norm_epsilon, name="final_norm", **settings)(x[:, count:])
        x = nn.with_logical_constraint(x, (axes.BATCH, axes.LENGTH, axes.ACTIVATION_EMBED))
        return VisualFeatures(x, jnp.ones(x.shape[:2], bool), self.grid(*images.shape[1:3]))

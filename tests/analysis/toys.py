"""Small encoders made of the package's layers, for what its ViT does not have."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.layers.attention import Context, MultiHeadAttention
from vlm_jax.layers.block import TransformerStack
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.patch_embed import PatchEmbed
from vlm_jax.layers.rope import rope_angles
from vlm_jax.types import VisualFeatures


class RotaryEncoder(nn.Module):
    """Rotary positions, grouped heads, normed queries and keys, and two segments."""

    patch_size: int = 4
    width: int = 16
    depth: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    stacks: int = 1
    pooled: bool = False
    pre_norm: bool = False

    def context(self, batch, length):
        positions = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
        segments = 1 + (positions >= length // 2).astype(jnp.int32)
        angles = rope_angles(positions, self.width // self.num_heads, 100.0)
        return Context("full", segments, segments, angles=angles)

    @nn.compact
    def __call__(self, images, *, collect=False):
        x = PatchEmbed(self.patch_size, self.width, name="patch_embed")(images)
        grid = (images.shape[1] // self.patch_size, images.shape[2] // self.patch_size)
        if self.pre_norm:
            x = Norm("layer", 1e-6, name="pre_norm")(x)
        block = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "mlp_dim": 8,
            "activation": "gelu",
            "norm": "layer",
            "norm_epsilon": 1e-6,
            "qk_norm": "rms",
        }
        hidden = None
        for i in range(self.stacks):
            stack = TransformerStack(self.depth, block, name=f"blocks_{i}")
            x, _, hidden = stack(x, self.context(*x.shape[:2]), collect=collect)
        pooled = None
        if self.pooled:  # a head that attends from one query to the patches
            head = MultiHeadAttention(self.num_heads, name="head")
            pooled = head(x.mean(1, keepdims=True), Context("full"), inputs_k=x)[0][:, 0]
        return VisualFeatures(x, jnp.ones(x.shape[:2], bool), grid, pooled=pooled, hidden=hidden)


class ClassTokenEncoder(nn.Module):
    """A class token before the patches, and one table of positions for all."""

    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, images):
        x = PatchEmbed(self.patch_size, self.width, name="patch_embed")(images)
        grid = (images.shape[1] // self.patch_size, images.shape[2] // self.patch_size)
        count = x.shape[1]
        prefix = self.param("cls", nn.initializers.normal(), (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(prefix, (len(x), 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(), (1, count + 1, self.width))
        block = {"mlp_dim": self.mlp_dim, "activation": "gelu_tanh", "norm": "layer", "norm_epsilon": 1e-6}
        x, _, _ = TransformerStack(self.depth, {"num_heads": self.num_heads, **block}, name="blocks")(
            x, Context("full")
        )
        x = Norm("layer", 1e-6, name="final_norm")(x)[:, 1:]
        return VisualFeatures(x, jnp.ones(x.shape[:2], bool), grid)


def randomised(params, seed=0, scale=0.3):
    """Parameters of the same shapes with no zero or one left, so that every one of them matters."""
    params = nn.meta.unbox(params)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        leaf + scale * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)

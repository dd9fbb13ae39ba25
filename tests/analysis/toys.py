"""A small encoder composed of the package's layers, for what its ViT does not have."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlm_jax.layers.attention import Context, MultiHeadAttention
from vlm_jax.layers.block import TransformerStack
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
    unit: bool = False

    def grid(self, height, width):
        return height // self.patch_size, width // self.patch_size

    def context(self, batch, length):
        positions = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
        segments = 1 + (positions >= length // 2).astype(jnp.int32)
        angles = rope_angles(positions, self.width // self.num_heads, 100.0)
        return Context("full", segments, segments, angles=angles)

    @nn.compact
    def __call__(self, images, *, collect=False):
        x = PatchEmbed(self.patch_size, self.width, name="patch_embed")(images)
        grid = self.grid(*images.shape[1:3])
        if self.unit:
            x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
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


def randomised(params, seed=0, scale=0.3):
    """Parameters of the same shapes with no zero or one left, so that every one of them matters."""
    params = nn.meta.unbox(params)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [leaf + scale * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)

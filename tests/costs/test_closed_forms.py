"""FLOPs of whole released systems, counted on their jaxprs, against closed forms of their published sizes.

Kaplan et al. 2020, table 1, and Chowdhery et al. 2022, appendix B: two FLOPs for every weight and position, four for
every pair of positions and width of attention; a gradient of all parameters is twice the forward pass.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from vlm_jax.costs.flops import count_flops
from vlm_jax.costs.training import training_flops
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained.known_system import known_system
from vlm_jax.types import RowShape

TEXT = 1024


def blocks(depth, length, width, mlp, *, attention=None, keys=None, matrices=2, kv=1.0):
    """FLOPs of transformer blocks.

    Args:
      depth, length, width, mlp: layers, positions, residual and hidden widths.
      attention: width of all heads; `width` when None.
      keys: keys that a query attends to; `length` when None.
      matrices: of the feed-forward, 3 where it is gated.
      kv: key and value heads as a share of query heads.
    """
    attention, keys = attention or width, keys or length
    weights = 2 * width * attention * (1 + kv) + matrices * width * mlp
    return depth * (2 * length * weights + 4 * length * keys * attention)


def llava():
    """ViT-L/14 at 336 pixels to its last layer but one, two linear layers, Vicuna 7B."""
    tower = 2 * 576 * 588 * 1024 + blocks(23, 577, 1024, 4096)
    connector = 2 * 576 * (1024 * 4096 + 4096 * 4096)
    return tower + connector + blocks(32, TEXT, 4096, 11008, matrices=3) + 2 * TEXT * 4096 * 32064


def internvl():
    """InternViT 300M at 448 pixels, tokens of 2 x 2 patches, Qwen2.5 7B."""
    tower = 2 * 1024 * 588 * 1024 + blocks(24, 1025, 1024, 4096)
    connector = 2 * 256 * (4096 * 3584 + 3584 * 3584)
    decoder = blocks(28, TEXT, 3584, 18944, matrices=3, kv=4 / 28)
    return tower + connector + decoder + 2 * TEXT * 3584 * 151674


def qwen():
    """A tower with windows of 64 patches in 28 of 32 layers, merged 2 x 2, Qwen2.5 3B with a tied head."""
    tower = 2 * 1024 * 1176 * 1280 + sum(
        blocks(n, 1024, 1280, 3420, keys=k, matrices=3) for n, k in ((28, 64), (4, 1024))
    )
    merger = 2 * 256 * (5120 * 5120 + 5120 * 2048)
    return tower + merger + blocks(36, TEXT, 2048, 11008, matrices=3, kv=2 / 16) + 2 * TEXT * 2048 * 151936


def clip():
    """ViT-L/14 at 336 pixels, and a text tower of 77 tokens."""
    image = 2 * 576 * 588 * 1024 + blocks(24, 577, 1024, 4096) + 2 * 1024 * 768
    return image + blocks(12, 77, 768, 3072) + 2 * 768 * 768


def siglip():
    """So400m/14 at 384 pixels, pooled by attention with one query, and a text tower of 64 tokens."""
    pooled = 2 * (2 * 729 + 2) * 1152 * 1152 + 2 * 2 * 1152 * 4304 + 4 * 729 * 1152
    image = 2 * 729 * 588 * 1152 + blocks(27, 729, 1152, 4304) + pooled
    return image + blocks(27, 64, 1152, 4304) + 2 * 1152 * 1152


CASES = {
    "llava-hf/llava-1.5-7b-hf": (llava, 1),
    "OpenGVLab/InternVL3-8B": (internvl, 1),
    "Qwen/Qwen2.5-VL-3B-Instruct": (qwen, 1024),
    "openai/clip-vit-large-patch14-336": (clip, None),
    "google/siglip-so400m-patch14-384": (siglip, None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_system_has_the_flops_of_its_closed_form(name):
    form, images = CASES[name]
    system = known_system(name, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = nn.meta.unbox(system.boxed_shapes())
    inputs = system.inputs if images is None else (system.example(RowShape(TEXT, images)),)

    def run(params, *inputs):
        found = system.model.apply({"params": params}, *inputs)
        return found if isinstance(system.model, VLM) else (found.image, found.text)

    assert count_flops(run, params, *inputs) == pytest.approx(form(), rel=0.01)

    def loss(params, *inputs):
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(run(params, *inputs)))

    assert training_flops(loss, params, *inputs) == pytest.approx(3 * form(), rel=0.01)

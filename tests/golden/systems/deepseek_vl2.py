"""DeepSeek-VL2: its SigLIP and projector, the heads that the model does not use, and all later outputs."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import vlm_jax
from tests.golden import comparison
from tests.golden.systems import deepseek_vl2_language, deepseek_vl2_prompts
from vlm_jax.checkpoints.maps.torch_layers import fused, layer_norm, linear
from vlm_jax.checkpoints.ops import Reshape
from vlm_jax.checkpoints.params import import_params
from vlm_jax.checkpoints.rules import Rule
from vlm_jax.layers.norm import Norm
from vlm_jax.layers.pooling import MapHead
from vlm_jax.processors.image import normalize


def _pooled(model, tokens: jax.Array) -> jax.Array:
    """The attention pooling that the checkpoint holds and the model does not use."""
    vit = model.module.encoder
    head = MapHead(vit.num_heads, vit.mlp_dim, "gelu", vit.norm_epsilon)
    rules = (
        Rule("latent", "probe", Reshape((1, 1, vit.width), (1, vit.width))),
        *linear("q", "attention/query"),
        *fused("kv", ("attention/key", "attention/value"), vit.width),
        *linear("proj", "attention/out"),
        *layer_norm("norm", "norm"),
        *linear("mlp.fc1", "mlp/up"),
        *linear("mlp.fc2", "mlp/down"),
    )
    prefix = "vision.attn_pool."
    stored = {key.removeprefix(prefix): x for key, x in model.checkpoint.items() if key.startswith(prefix)}
    shapes = jax.eval_shape(lambda x: head.init(jax.random.key(0), x)["params"], tokens)
    params = import_params(rules, stored, nn.meta.unbox(shapes))
    return head.apply({"params": params}, tokens)


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every vision array of the folder."""
    expected = comparison.read(folder).expected
    tiles = inputs["pool.tiles_u8"][: len(expected["vit.pixels"])]
    pixels = np.stack([normalize(tile, (0.5,) * 3, (0.5,) * 3) for tile in tiles])
    model = vlm_jax.from_pretrained(folder)

    vit, params = model.module.encoder, model.params["encoder"]

    @jax.jit
    def run(params, pixels):
        def patches(part, _):
            return part.name == "patch_embed"

        return vit.apply({"params": params}, pixels, collect=True, capture_intermediates=patches)

    features, state = run(params, jnp.asarray(pixels))
    found = {f"vit.block.{i}": hidden for i, hidden in enumerate(features.hidden[1:])}
    found["vit.pixels"] = pixels.transpose(0, 3, 1, 2)
    found["vit.patch_embed"] = state["intermediates"]["patch_embed"]["__call__"][0]
    found["vit.features"] = features.tokens
    norm = Norm("layer", vit.norm_epsilon)
    found["vit.penultimate_normed"] = norm.apply({"params": params["final_norm"]}, features.hidden[-2])
    found["vit.pooled"] = _pooled(model, features.tokens)
    found["proj.out"] = jax.jit(lambda x: model.apply(x, method="visual_tokens").tokens)(jnp.asarray(pixels))
    found |= deepseek_vl2_prompts.outputs(comparison.read(folder))
    found |= deepseek_vl2_language.outputs(comparison.read(folder), model)
    found |= _layouts(model, expected, inputs["pool.tiles_u8"])
    return {name: np.asarray(array) for name, array in found.items() if name in expected}


def _layouts(model, expected: dict[str, np.ndarray], pool: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of images whose canvases are so many tiles wide and high, of the first tiles of the pool."""
    views, found = model.processor.views, {}
    tiles = jnp.asarray(np.stack([normalize(tile, (0.5,) * 3, (0.5,) * 3) for tile in pool]))
    tokens = jax.jit(lambda x: model.apply(x, method="visual_tokens").tokens)(tiles)
    learned = [model.checkpoint[name][...] for name in ("image_newline", "view_seperator")]
    for name in expected:
        if sizes := re.fullmatch(r"layout\.(\d+)x(\d+)\.image_embeds", name):
            cols, rows = map(int, sizes.groups())
            layout = views.layout((rows, cols))
            table = np.concatenate([learned, tokens.reshape(-1, tokens.shape[-1])])
            found[name] = table[np.where(layout < 0, -1 - layout, layout + len(learned))]
    return found

"""Connectors compared with the projectors of transformers and of torch, through the rules of released names."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import InternVLConfig, InternVLModel

from vlm_jax.checkpoints.maps import deepseek_vl2, internvl
from vlm_jax.checkpoints.params import import_params
from vlm_jax.connectors.pixel_shuffle import PixelShuffle
from vlm_jax.types import VisualFeatures


def features(*shape):
    """A map [batch, rows, columns, width] in torch, and the same as features."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    flat = jnp.asarray(x.reshape(shape[0], -1, shape[-1]))
    return torch.from_numpy(x), VisualFeatures(flat, jnp.ones(flat.shape[:2], bool), shape[1:3])


def randomised(module):
    torch.manual_seed(0)
    with torch.no_grad():  # fresh scales and biases are constants
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module.eval()


def tokens(connector, rules, tensors, inputs):
    """The connector's tokens under released tensors."""
    arrays = {key: tensor.detach().numpy() for key, tensor in tensors.items()}
    init = functools.partial(connector.init, deterministic=True)
    params = import_params(rules, arrays, jax.eval_shape(init, jax.random.key(0), inputs)["params"])
    return jax.jit(functools.partial(connector.apply, deterministic=True))({"params": params}, inputs).tokens


def check(ours, theirs):
    theirs = theirs.detach().numpy().reshape(ours.shape)
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("factor", [2, 4])
def test_internvl(factor):
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**vision, "hidden_size": 12, "vocab_size": 9, "num_key_value_heads": 1, "model_type": "qwen2"}
    config = InternVLConfig(vision_config=vision, text_config=text, downsample_ratio=1 / factor)
    model = randomised(InternVLModel(config))
    projector = model.multi_modal_projector
    x, inputs = features(2, 8, 4, 8)
    expected = projector(model.pixel_shuffle(x, scale_factor=1 / factor))
    names = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}
    released = {".".join((names[key.split(".")[0]], key.split(".")[1])): x for key, x in projector.state_dict().items()}
    check(tokens(PixelShuffle(12, factor), internvl.projector_rules(), released, inputs), expected)


@pytest.mark.parametrize(("side", "factor", "depth", "ratio"), [(5, 2, 2, 1), (4, 3, 3, 2), (4, 2, 4, 1)])
def test_deepseek_vl2_unfolds_channels_first_and_pads_with_zeros(side, factor, depth, ratio):
    width, out = 6, 8
    x, inputs = features(2, side, side, width)
    pad = -side % factor
    columns = functional.unfold(functional.pad(x.movedim(3, 1), (0, pad, 0, pad)), factor, stride=factor)
    sizes = [width * factor**2, *[out * ratio] * (depth - 1), out]
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    stack = randomised(torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.GELU())][:-1]))
    connector = PixelShuffle(out, factor, norm=None, mlp_dim=out * ratio, depth=depth)
    rules = deepseek_vl2.projector_rules(width=width, factor=factor, hidden_dim=out * ratio, depth=depth)
    released = {f"layers.{key}": tensor for key, tensor in stack.state_dict().items()}
    check(tokens(connector, rules, released, inputs), stack(columns.movedim(1, 2)))

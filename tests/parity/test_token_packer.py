"""TokenPacker compared with a torch definition of it, written here after the release, which cannot be installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.linen import meta
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

import vlm_jax
from vlm_jax.connectors.token_packer import TokenPacker
from vlm_jax.types import VisualFeatures

from ..parameters import drawn

WIDTH, LEVELS, OUT, HEADS = 16, 40, 12, 2


class Packer(nn.Module):
    """Li et al. 2024, section 3.2: point queries, region keys and values, multi-head attention, MLP."""

    def __init__(self, levels):
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key, self.value = (
            nn.Sequential(nn.Linear(levels, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(2)
        )
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(3))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, OUT), nn.GELU(), nn.Linear(OUT, OUT))

    def forward(self, x, levels, mask, factor):
        """x [B, rows, cols, D], levels [B, rows, cols, E], mask [B, rows, cols]."""
        rows, cols = x.shape[1] // factor, x.shape[2] // factor
        channels_first = x.movedim(-1, 1)
        coarse = functional.interpolate(channels_first, (rows, cols), mode="bilinear").movedim(1, -1)
        out = torch.zeros(len(x), rows * cols, OUT)
        for b, i, j in np.ndindex(len(x), rows, cols):
            square = (b, slice(i * factor, (i + 1) * factor), slice(j * factor, (j + 1) * factor))
            real = levels[square][mask[square]][None]
            query = self.query_norm(self.query(coarse[b, i, j]))[None, None]
            key, value = self.key_norm(self.key(real)), self.value_norm(self.value(real))
            out[b, i * cols + j] = self.mlp(self.attention(query, key, value)[0][0, 0])
        return out


def copy(theirs, params):
    def put(module, values):
        module.weight.copy_(torch.from_numpy(values["kernel"].T.copy()))
        if "bias" in values:
            module.bias.copy_(torch.from_numpy(values["bias"]))

    with torch.no_grad():
        put(theirs.query, params["query_proj"])
        for name in ("key", "value"):
            put(getattr(theirs, name)[0], params[f"{name}_mlp"]["up"])
            put(getattr(theirs, name)[2], params[f"{name}_mlp"]["down"])
        put(theirs.mlp[0], params["mlp"]["up"])
        put(theirs.mlp[2], params["mlp"]["down"])
        for name in ("query_norm", "key_norm", "value_norm"):
            getattr(theirs, name).weight.copy_(torch.from_numpy(params[name]["scale"]))
            getattr(theirs, name).bias.copy_(torch.from_numpy(params[name]["bias"]))
        heads = [params["attention"][name] for name in ("query", "key", "value")]
        theirs.attention.in_proj_weight.copy_(torch.from_numpy(np.concatenate([h["kernel"].T for h in heads])))
        theirs.attention.in_proj_bias.copy_(torch.from_numpy(np.concatenate([h["bias"] for h in heads])))
        put(theirs.attention.out_proj, params["attention"]["out"])


def check(connector, grid, mask, tokens, levels=None):
    features = VisualFeatures(jnp.asarray(tokens), jnp.asarray(mask.reshape(2, -1)), grid, levels=levels)
    init = functools.partial(connector.init, deterministic=True)
    params = jax.tree.map(np.array, meta.unbox(drawn(jax.eval_shape(init, jax.random.key(0), features)))["params"])
    fine = tokens if levels is None else np.array(levels)
    theirs = Packer(fine.shape[-1]).eval()
    copy(theirs, params)
    x, fine = (torch.from_numpy(array).reshape(2, *grid, -1) for array in (tokens, fine))
    with torch.no_grad():
        expected = theirs(x, fine, torch.from_numpy(mask), connector.factor).numpy()
    got = jax.jit(functools.partial(connector.apply, deterministic=True))({"params": params}, features)
    assert np.abs(got.tokens - expected).max() <= 1e-5 * np.abs(expected).max()
    assert got.mask.all()


@pytest.mark.parametrize(("grid", "factor"), [((4, 6), 2), ((3, 6), 3), ((4, 8), 4), ((1, 5), 1)])
@pytest.mark.parametrize("several", [False, True])
def test_against_torch(grid, factor, several):
    rng = np.random.default_rng(0)
    count = grid[0] * grid[1]
    tokens = rng.normal(size=(2, count, WIDTH)).astype(np.float32)
    levels = jnp.asarray(rng.normal(size=(2, count, LEVELS)), jnp.float32) if several else None
    check(TokenPacker(OUT, factor, HEADS), grid, np.ones((2, *grid), bool), tokens, levels)


def test_levels_are_hidden_states_of_the_encoder(tmp_path):
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=12, patch_size=4
    )
    model = CLIPVisionModel(config).eval()
    model.save_pretrained(tmp_path)
    images = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    with torch.no_grad():
        states = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), output_hidden_states=True).hidden_states
    ours = vlm_jax.from_pretrained(tmp_path)
    apply = jax.jit(ours.module.clone(levels=(1, 3, -1, 0)).apply)
    expected = torch.cat([states[i][:, 1:] for i in (1, 3, 4, 0)], dim=-1).numpy()
    levels = apply({"params": ours.params}, jnp.asarray(images)).levels
    assert np.abs(levels - expected).max() <= 1e-5 * np.abs(expected).max()


def test_masked_features_are_no_keys():
    """The bilinear points of squares of 4 are read from the four cells in the middle, which stay."""
    rng = np.random.default_rng(0)
    mask = rng.uniform(size=(2, 4, 8)) < 0.5
    mask[:, 1:3, 1:3] = mask[:, 1:3, 5:7] = True
    check(TokenPacker(OUT, 4, HEADS), (4, 8), mask, rng.normal(size=(2, 32, WIDTH)).astype(np.float32))


def test_points_are_read_from_what_is_real():
    """Of the two by two features that a point is between, only one is real: the point is that one."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(2, 4, 4, WIDTH)).astype(np.float32)
    mask = np.zeros((2, 4, 4), bool)
    mask[:, ::2, 1::2] = True
    alone = np.repeat(np.repeat(tokens[:, ::2, 1::2], 2, axis=1), 2, axis=2)
    connector = TokenPacker(OUT, 2, HEADS)
    init = functools.partial(connector.init, deterministic=True)
    apply = jax.jit(functools.partial(connector.apply, deterministic=True))
    given, expected = (
        VisualFeatures(jnp.asarray(x.reshape(2, 16, WIDTH)), jnp.asarray(mask.reshape(2, 16)), (4, 4))
        for x in (tokens, alone)
    )
    expected = VisualFeatures(expected.tokens, jnp.ones((2, 16), bool), (4, 4))
    params = drawn(jax.eval_shape(init, jax.random.key(0), given))
    np.testing.assert_allclose(apply(params, given).tokens, apply(params, expected).tokens, atol=1e-5)

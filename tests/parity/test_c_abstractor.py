"""The C-Abstractor compared with a torch definition after the paper and timm's RegNet bottleneck."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.linen import meta
from torch import nn
from torch.nn import functional

from vlm_jax.connectors.c_abstractor import CAbstractor
from vlm_jax.types import VisualFeatures

from ..parameters import drawn


class Normed(nn.Module):
    """A convolution without bias and a LayerNorm over its channels."""

    def __init__(self, in_dim, dim, window=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, window, padding=window // 2, groups=groups, bias=False)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x):
        return self.norm(self.conv(x).movedim(1, -1)).movedim(-1, 1)


class Bottleneck(nn.Module):
    """Radosavovic et al. 2020, figure 4, with SE after the middle convolution and groups of one channel."""

    def __init__(self, in_dim, dim):
        super().__init__()
        self.expand, self.depthwise, self.project = Normed(in_dim, dim), Normed(dim, dim, 3, dim), Normed(dim, dim)
        self.squeeze, self.excite = nn.Linear(dim, round(in_dim / 4)), nn.Linear(round(in_dim / 4), dim)
        self.shortcut = nn.Identity() if in_dim == dim else Normed(in_dim, dim)

    def forward(self, x):
        y = functional.silu(self.depthwise(functional.silu(self.expand(x))))
        gate = torch.sigmoid(self.excite(functional.silu(self.squeeze(y.mean((2, 3))))))
        return functional.silu(self.project(y * gate[..., None, None]) + self.shortcut(x))


class Abstractor(nn.Module):
    def __init__(self, grid, in_dim, dim, depth, output_grid, out_dim):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(grid[0] * grid[1], in_dim))
        widths = [in_dim] + [dim] * (2 * depth)
        blocks = [Bottleneck(*pair) for pair in itertools.pairwise(widths)]
        pool = nn.AdaptiveAvgPool2d(output_grid)
        self.net = nn.Sequential(*blocks[:depth], pool, *blocks[depth:])
        self.up, self.down = nn.Linear(widths[-1], out_dim), nn.Linear(out_dim, out_dim)
        self.grid = grid

    def forward(self, x):
        x = (x + self.positions).movedim(1, 2).unflatten(2, self.grid)
        x = self.net(x).flatten(2).movedim(1, 2)
        return self.down(functional.silu(self.up(x)))


def copy(theirs, params):
    """Sets the torch module's parameters; ours are {name: array} with the layers of a stage first."""

    def put(module, values):
        kernel = values["kernel"]
        if kernel.ndim == 4:
            kernel = kernel.transpose(3, 2, 0, 1)
        elif isinstance(module, nn.Conv2d):
            kernel = kernel.T[..., None, None]
        else:
            kernel = kernel.T
        module.weight.copy_(torch.from_numpy(kernel.copy()))
        if "bias" in values:
            module.bias.copy_(torch.from_numpy(values["bias"]))

    def normed(module, values, name):
        put(module.conv, values[name])
        module.norm.weight.copy_(torch.from_numpy(values[f"{name}_norm"]["scale"]))
        module.norm.bias.copy_(torch.from_numpy(values[f"{name}_norm"]["bias"]))

    stages = []
    for stage in ("before", "after"):
        stages += [params[f"{stage}_first"]] if f"{stage}_first" in params else []
        count = len(params[stage]["expand"]["kernel"]) if stage in params else 0
        stages += [jax.tree.map(lambda leaf, i=i: leaf[i], params[stage]) for i in range(count)]
    with torch.no_grad():
        theirs.positions.copy_(torch.from_numpy(params["positions"]["table"]))
        blocks = [block for block in theirs.net if isinstance(block, Bottleneck)]
        for block, values in zip(blocks, stages, strict=True):
            for name in ("expand", "depthwise", "project", *(["shortcut"] if "shortcut" in values else [])):
                normed(getattr(block, name), values, name)
            put(block.squeeze, values["squeeze_excite"]["up"])
            put(block.excite, values["squeeze_excite"]["down"])
        put(theirs.up, params["mlp"]["up"])
        put(theirs.down, params["mlp"]["down"])


def images(grid, width, batch=2):
    tokens = np.random.default_rng(0).normal(size=(batch, grid[0] * grid[1], width)).astype(np.float32)
    return VisualFeatures(jnp.asarray(tokens), jnp.ones(tokens.shape[:2], bool), grid)


def values_of(connector, features):
    shapes = jax.eval_shape(functools.partial(connector.init, deterministic=True), jax.random.key(0), features)
    return jax.tree.map(np.array, meta.unbox(drawn(shapes))["params"])


@functools.cache
def apply(connector):
    return jax.jit(functools.partial(connector.apply, deterministic=True))


@pytest.mark.parametrize(
    ("grid", "output_grid", "width", "depth"),
    [((6, 6), (3, 3), None, 3), ((5, 7), (2, 3), 12, 2), ((1, 6), (1, 4), 20, 1), ((4, 4), (2, 2), None, 0)],
)
def test_against_torch(grid, output_grid, width, depth):
    features = images(grid, 20)
    ours = CAbstractor(16, output_grid, grid, depth, width)
    params = values_of(ours, features)
    theirs = Abstractor(grid, 20, width or 20, depth, output_grid, 16).eval()
    copy(theirs, params)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.array(features.tokens))).numpy()
    got = apply(ours)({"params": params}, features)
    assert np.abs(got.tokens - expected).max() <= 1e-5 * np.abs(expected).max()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(p.numel() for p in theirs.parameters())


def test_what_is_masked_is_outside_of_the_image():
    whole = images((4, 4), 20)
    wide = np.full((2, 4, 8, 20), 7.0, np.float32)
    wide[:, :, :4] = np.array(whole.tokens).reshape(2, 4, 4, 20)
    mask = np.broadcast_to(np.arange(8) < 4, (2, 4, 8))
    padded = VisualFeatures(jnp.asarray(wide.reshape(2, 32, 20)), jnp.asarray(mask.reshape(2, 32)), (4, 8))
    small, large = (CAbstractor(16, (2, cols // 2), (4, cols), 2) for cols in (4, 8))
    params = values_of(large, padded)
    table = params["positions"]["table"].reshape(4, 8, 20)[:, :4].reshape(16, 20)
    expected = apply(small)({"params": {**params, "positions": {"table": table}}}, whole)
    got = apply(large)({"params": params}, padded)
    np.testing.assert_allclose(
        got.tokens.reshape(2, 2, 4, 16)[:, :, :2], expected.tokens.reshape(2, 2, 2, 16), atol=1e-5
    )

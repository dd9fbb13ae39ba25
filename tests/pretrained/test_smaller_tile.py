"""The size of a tile that meets a budget: 336 pixels are 24 x 24 patches of 14, as in LLaVA-1.5."""

import functools

import jax
import numpy as np
import pytest
from flax.core import FrozenDict

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.config import ConfigError
from vlm_jax.connectors.concat import Concat
from vlm_jax.connectors.ldp import LDP
from vlm_jax.connectors.ldp_v2 import LDPv2
from vlm_jax.connectors.matryoshka import Matryoshka
from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.connectors.pixel_shuffle import PixelShuffle
from vlm_jax.connectors.resampler import Resampler
from vlm_jax.encoders.multiscale import MultiScale
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained.smaller_tile import smaller_tile
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.square import SquareViews
from vlm_jax.reducers.uniform_stride import UniformStride

from ..advice import tried

SECTION = {"kind": "downsample_image"}


def vit(side, **fields):
    return ViT(image_size=(side, side), patch_size=14, width=8, depth=1, num_heads=2, mlp_dim=8, **fields)


def solve(tokens, connector, side=336, encoder=None, section=SECTION, class_tokens=0):
    encoder = vit(side) if encoder is None else encoder
    grid = encoder.grid(side, side)
    views = SquareViews(Pixels(), (side, side), connector.num_tokens(grid) + class_tokens)
    return smaller_tile(VLM(encoder, connector), views, grid, tokens, section, "config.reducer")


def reduced(encoder, connector, tokens, reduce):
    """The shape of the tokens with another reducer."""
    model = VLM(encoder, connector, reducer=UniformStride(num_kept=tokens), reduce=reduce)
    seen = functools.partial(model.init_with_output, jax.random.key(0), method="visual_tokens")
    return jax.eval_shape(seen, np.zeros((1, *encoder.image_size, 3), np.float32))[0].tokens.shape


@pytest.mark.parametrize(
    ("connector", "tokens", "token_grid", "patches"),
    [
        (MlpConnector(8), 144, (12, 12), (12, 12)),
        (MlpConnector(8), 6, (2, 3), (2, 3)),
        (MlpConnector(8), 576, (24, 24), (24, 24)),
        (PixelShuffle(8, factor=2), 36, (6, 6), (12, 12)),
        (PixelShuffle(8, factor=5), 25, (5, 5), (24, 24)),  # squares at the edges are completed
        (PixelShuffle(8, factor=5), 9, (3, 3), (15, 15)),
        (Concat(8, factor=2), 4, (2, 2), (4, 4)),
        (LDP(8, stride=2), 16, (4, 4), (8, 8)),
        (LDPv2(8, output_grid=(12, 12)), 16, (4, 4), (8, 8)),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "features") else str(value),
)
def test_a_token_stands_for_as_many_patches_as_before(connector, tokens, token_grid, patches):
    tile = solve(tokens, connector)
    assert tile.size == (14 * patches[0], 14 * patches[1]) and tile.token_grid == token_grid
    assert tile.connector.num_tokens(patches) == tokens
    assert type(tile.connector) is type(connector)


def test_what_the_patches_leave_over_is_left_over_of_the_smaller_tile_too():
    tile = solve(49, PixelShuffle(8, factor=2), side=384)  # DeepSeek-VL2: 27 patches of 14 and 6 pixels
    assert tile.size == (384 * 14 // 27, 384 * 14 // 27)
    assert vit(384).grid(*tile.size) == (14, 14)


def test_the_nearest_budgets_are_named():
    with pytest.raises(InfeasibleBudget, match="nearest feasible: 4 and 6"):
        solve(5, MlpConnector(8))
    with pytest.raises(InfeasibleBudget, match="nearest feasible: 144"):
        solve(145, PixelShuffle(8, factor=2))


def test_what_gives_as_many_tokens_at_any_size_is_refused():
    with pytest.raises(ConfigError, match="queries of Resampler make 16 tokens all the same"):
        solve(4, Resampler(8, num_queries=16))
    scales = MultiScale(vit(336), scales=(), image_sizes=((336, 336), (672, 672)), max_split_size=336)
    with pytest.raises(ConfigError, match="needs a 12x12 grid of features, and MultiScale gives 24x24 of 336x336"):
        solve(144, MlpConnector(8), side=672, encoder=scales)


def test_a_class_token_has_no_place_in_the_grid():
    encoder = vit(336, class_token=True, keep_class_token=True)
    told = tried("{} leaves a grid of tokens, and a tile has {577}, which are more than its {24}x{24} grid (a")
    with pytest.raises(ConfigError, match=rf"{told} class token is among them\); choose another reducer"):
        solve(144, MlpConnector(8), encoder=encoder, class_tokens=1)
    assert reduced(encoder, MlpConnector(8), 144, "features") == (1, 144, 8)


def test_unknown_settings_are_refused():
    with pytest.raises(ConfigError, match=r"config\.reducer\.size"):
        solve(144, MlpConnector(8), section={**SECTION, "size": 3})


def test_a_connector_of_one_grid_takes_another_reducer():
    nested = Matryoshka(8, FrozenDict(kind="pool"), (4, 16), 16, ({"output_grid": (2, 2)}, {"output_grid": (4, 4)}))
    told = tried("{} leaves no grid inside {4}x{4} of which {Matryoshka} makes {2}x{2} tokens; choose another reducer")
    with pytest.raises(ConfigError, match=told):
        solve(4, nested, side=56)
    assert reduced(vit(56), nested, 4, "tokens") == (1, 4, 8)

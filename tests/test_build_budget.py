"""What a token budget is for: images, tiles or frames, of one size or of their own."""

import dataclasses
from fractions import Fraction

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from vlm_jax.budget import InfeasibleBudget, share
from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.types import PackedPatches, Sample, Turn, dialogue

from .advice import tried

VIT = {"patch_size": 12, "width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16}
ENCODERS = {
    "qwen_vit": {**VIT},
    "windows": {**VIT, "kind": "qwen_vit", "depth": 2, "window_size": 48, "full_layers": (1,)},
    "unmerged": {**VIT, "kind": "qwen_vit"},
    "siglip2_navit": VIT,
    "axial_vit": VIT,
    "merging_vit": VIT,
    "rice_vit": VIT,
    "naflex": {**VIT, "table_grid": (4, 4)},
}
CONNECTORS = {
    "qwen_vit": {"kind": "concat"},
    "windows": {"kind": "pixel_shuffle"},
    "rice_vit": {"kind": "concat"},
    "axial_vit": {"kind": "block_mean"},
    "merging_vit": {"kind": "pixel_shuffle"},
    "siglip2_navit": {"kind": "visual_vocabulary", "vocab_size": 12},
}


def made(budget=16, per="image", native=None, **changes):
    """The base config with a token budget, another encoder and other settings of the processor."""
    config = base.get_config()
    config.token_budget, config.token_budget_per = budget, per
    config.connector = ConfigDict({"kind": "pool"})
    if native is not None:
        config.connector = ConfigDict(CONNECTORS.get(native, {"kind": "mlp"}))
        config.encoder = ConfigDict({"kind": native, **ENCODERS[native]})
        config.processor.image_size = None
    for key, value in changes.items():
        section = config.processor if key in config.processor else config
        section[key] = value
    return config


def page(*sizes, seed=0):
    """A sample with an image of each of the sizes."""
    rng = np.random.default_rng(seed)
    pictures = tuple(rng.integers(0, 256, (*size, 1), np.uint8) for size in sizes)
    return Sample("page", dialogue([Turn("count 7", "2")], num_images=len(sizes)), pictures, "count")


def counts(experiment, sample):
    """Visual tokens of a sample's images."""
    return experiment.example(sample, targets=False).visual_tokens


def prompt(experiment, sample):
    """The sample as a prompt of the evaluation."""
    processor = experiment.system.processor
    return processor.rows([[experiment.example(sample, targets=False)]], experiment.prompt, targets=False)


def shapes(experiment):
    """Images of a training row."""
    return experiment.system.example(experiment.row).images


@pytest.mark.parametrize(
    ("per", "budget", "view", "image"),
    [("image", 20, 4, 20), ("tile", 4, 4, 20), ("image", 80, 16, 80), ("tile", 1, 1, 5)],
)
def test_a_budget_is_shared_by_tiles_and_thumbnail(per, budget, view, image):
    experiment = build(made(budget, per, tiles=(2, 2), thumbnail=True))
    system = experiment.system
    assert system.budget.grid == (4, 4)  # of a tile
    assert system.model.connector.num_tokens(system.budget.grid) == view
    assert (system.budget.entering, system.budget.left, system.budget.mean) == (image, image, image)
    row = prompt(experiment, page((48, 48)))
    assert row.images.shape == (1, 5, 48, 48, 1) == shapes(experiment).shape
    assert row.visual_index[row.visual_index >= 0].tolist() == list(range(image))
    assert counts(experiment, page((48, 48))) == (image,)


@pytest.mark.parametrize(("per", "budget", "clip"), [("image", 24, 24), ("frame", 8, 24), ("tile", 4, 24)])
def test_a_budget_is_shared_by_the_frames_of_a_clip(per, budget, clip):
    experiment = build(made(budget, per, tiles=(1, 2), frames=3))
    assert experiment.system.budget.entering == clip
    frames = page(*[(48, 96)] * 9)
    row = experiment.training_row(frames)
    assert row.images.shape == (1, 6, 48, 48, 1) == shapes(experiment).shape
    assert row.visual_index[row.visual_index >= 0].tolist() == list(range(clip))
    same = experiment.training_row(dataclasses.replace(frames, images=frames.images[1::3]))  # frames 1, 4 and 7
    np.testing.assert_array_equal(row.images, same.images)


def test_a_reducer_of_videos_takes_the_frames_of_a_clip_together():
    config = made(24, tiles=(1, 2), frames=3, reducer=ConfigDict({"kind": "dycoke"}), connector={"kind": "mlp"})
    with pytest.raises(ConfigError, match=tried("set config.processor.tiles to (1, 1) and config.processor.thumbnail")):
        build(config)
    config.processor.tiles = (1, 1)
    experiment = build(config)
    reducer = experiment.system.model.reducer
    assert (reducer.frames, reducer.num_kept, experiment.system.budget.left) == (3, 8, 24)
    assert counts(experiment, page(*[(48, 48)] * 3)) == (24,)
    config.row = {"length": 60, "images": 4, "pack": True}
    with pytest.raises(ConfigError, match=r"config.row.images: dycoke .* a multiple of .*frames=3, got 4"):
        build(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            made(18, tiles=(2, 2), thumbnail=True),
            tried("config.token_budget: {18} tokens are {no equal parts for 5 views}; nearest feasible: {10 and 20}"),
        ),
        (
            made(28, tiles=(2, 2)),
            "28 tokens are 7 for each of 4 views.* pool cannot give 7.*nearest feasible: 24 and 32",
        ),
        (made(7, "tile", tiles=(2, 2)), "pool cannot give 7 tokens from a 4x4 grid.*nearest feasible: 6 and 8"),
        (made(100, tiles=(2, 2)), "nearest feasible: 64$"),
        (made(3, tiles=(2, 2)), "3 tokens are no equal parts for 4 views; nearest feasible: 4$"),
        (made(4, native="unmerged"), None),
        (made(6, native="unmerged"), "6 tokens: they are in blocks of 4"),
        (made(8, native="qwen_vit", min_tokens=9), "at least config.processor.min_tokens=9"),
        (made(9, native="qwen_vit", frames=4), "9 tokens are no equal parts for 2 views; nearest feasible: 8 and 10"),
        (made(3, "frame", native="qwen_vit", frames=3), "3 tokens are no equal parts for 2/3 views.*: 2 and 4"),
    ],
)
def test_a_budget_that_cannot_be_shared_names_the_nearest(config, message):
    if message is None:
        build(config)
        return
    with pytest.raises(InfeasibleBudget, match=message) as error:
        build(config)
    for budget in str(error.value).rsplit("nearest feasible: ", 1)[1].split(" and ") if "nearest" in message else ():
        config.token_budget = int(budget)
        build(config)


def test_one_view_keeps_the_error_of_its_kind():
    def solve(budget):
        raise InfeasibleBudget("as it is")

    with pytest.raises(InfeasibleBudget, match=r"^as it is$"):
        share(3, Fraction(1), 4, solve)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (made(per="tle"), "config.token_budget_per: expected one of 'image', 'frame', 'tile', got 'tle'"),
        (made(per="frame"), "config.token_budget_per: there are no frames; set config.processor.frames"),
        (made(thumbnail=True), "config.processor.thumbnail: needs several tiles"),
        (made(tiles=(0, 2)), "tiles.0.: expected at least 1 and at most 100, got 0"),
        (made(frames=0), "config.processor.frames: expected at least 1"),
        (made(min_tokens=4), "config.processor.min_tokens: is for encoders that pack"),
        (
            made(image_size=None),
            "config.processor.image_size: expected \\(height, width\\) for config.encoder.kind vit",
        ),
        (made(native="qwen_vit", image_size=(48, 48)), "config.processor.image_size: set it to None"),
        (made(native="naflex", tiles=(2, 2)), r"config.processor.tiles: set it to \(1, 1\)"),
        (made(native="naflex", reducer=ConfigDict({"kind": "random"})), "random reduces image by image"),
        (
            made(native="naflex", connector=ConfigDict({"kind": "pool"})),
            "pool needs one image's grid",
        ),
        (made(encoder=ConfigDict({"kind": "qwen_vitt"})), "no kind 'qwen_vitt'; did you mean 'qwen_vit'"),
    ],
)
def test_settings_that_do_not_go_together_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        build(config)


@pytest.mark.parametrize("native", ENCODERS)
def test_pictures_of_any_size_stay_within_their_budget(native):
    """Counts are those of the grid, the sequence has one length, and every token has its place in it."""
    experiment = build(made(16, native=native))
    system = experiment.system
    block = system.model.encoder.patch_format.block_size
    found = set()
    for size in [(48, 48), (200, 31), (12, 12), (1, 500), (100, 100), (47, 61)]:
        sample = page(size)
        (count,) = counts(experiment, sample)
        assert 1 <= count <= 16 == system.budget.entering
        row = prompt(experiment, sample)
        assert row.visual_index[row.visual_index >= 0].tolist() == list(range(count))
        height, width = (max(block, round(side / block) * block) for side in size)
        tokens = system.model.connector.num_tokens(system.model.encoder.grid(height, width))
        assert count == tokens or tokens > 16  # small images stay as they are
        assert isinstance(row.images, PackedPatches)
        found.add(tuple(leaf.shape for leaf in jax.tree.leaves(row.images)))
    assert found == {tuple(leaf.shape for leaf in jax.tree.leaves(shapes(experiment)))}


def test_frames_of_any_size_share_the_budget_of_their_clip():
    experiment = build(made(4, "frame", native="qwen_vit", frames=4))
    assert experiment.system.budget.entering == 16  # two frames share a patch, and their tokens
    sample = page(*[(96, 48)] * 8)
    assert counts(experiment, sample) == (2 * 8,)
    row = experiment.training_row(sample)
    assert row.images.segment_ids.max() == 2 and np.count_nonzero(row.images.segment_ids) == 16 * 4


def test_a_small_picture_is_enlarged_to_its_least():
    found = [counts(build(made(16, native="naflex", min_tokens=least)), page((12, 24))) for least in (1, 8)]
    assert found == [(2,), (8,)]


def test_clips_of_any_length_come_from_files(tmp_path):
    config = made(4, frames=2)
    section = {"kind": "conversations", "train_path": "a", "evaluation_path": "b", "channels": 1, "num_images": None}
    config.data = ConfigDict(section)
    assert build(config).num_frames == 2
    config.processor.frames = None
    with pytest.raises(ConfigError, match=r"config\.data\.num_images: None is for samples that are clips"):
        build(config)

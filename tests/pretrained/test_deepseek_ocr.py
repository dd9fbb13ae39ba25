"""DeepSeek-OCR as a system whose pictures have tiles of another size: costs, static rows, budgets and settings."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax import from_pretrained
from vlm_jax.config import ConfigError
from vlm_jax.costs.flops import count_flops
from vlm_jax.pretrained.budgets import with_budget
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.processing.deepseek_ocr import mode
from vlm_jax.sweep.costs import flops
from vlm_jax.types import RowShape, WholesAndTiles

from ..cases.inference.folders import edit, golden_folder
from ..contracts.releases import make

SAID = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read."}]}]
WIDE = np.zeros((20, 40, 3), np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make("deepseek_ocr", tmp_path_factory.mktemp("deepseek_ocr"))


def test_the_encoder_costs_what_the_whole_and_its_tiles_do(model):
    """A whole of 192 pixels and two tiles of 120."""
    batch = model.processor(SAID, [WIDE])
    assert isinstance(batch.images, WholesAndTiles)
    shapes = nn.meta.unbox(model.system.boxed_shapes())

    def seen(count, side):
        pixels = jax.ShapeDtypeStruct((count, side, side, 3), np.float32)
        run = model.module.encoder.apply
        return count_flops(lambda params, given: run({"params": params}, given), shapes["encoder"], pixels)

    assert flops(model.module, shapes, batch)["encoder"] == seen(1, 192) + seen(2, 120)


def test_static_rows_have_room_for_tiles_of_more_tokens_than_the_whole(model):
    """A whole of 64 pixels is one token, and a tile of 128 is four."""
    views = mode(model.processor.views.pixels, 64, 128, True, max_crops=2, crop_threshold=16)
    processor = dataclasses.replace(model.processor, views=views)
    system = dataclasses.replace(model.system, make_processor=lambda: processor)
    reduced = with_budget(system, None, reducer={"kind": "fastv", "layer": 1}).processor
    row = [reduced.example(SAID, [WIDE])]
    exact, static = (reduced.rows([row], shape, targets=True) for shape in (None, RowShape(row[0].load.length, 3)))
    np.testing.assert_array_equal(static.places.index, exact.places.index)
    assert static.places.index.shape == (1, 3, 4)


def test_a_drop_in_the_decoder_may_keep_positions(model):
    made = with_budget(model.system, 4, reducer={"kind": "fastv", "layer": 1, "positions": "keep"})
    assert made.processor(SAID, [WIDE]).visual_positions is None
    with pytest.raises(ConfigError, match=r"reducer\.positions: expected consecutive where tiles have another size"):
        with_budget(model.system, 4, reducer={"kind": "divprune", "positions": "keep"})


def test_a_connector_that_does_not_take_a_tile_is_refused(model):
    """Of the 3 x 3 features of the whole one token is made, of the 2 x 2 of a tile none."""
    with pytest.raises(ConfigError, match=r"config\.connector\.kind: concat does not take the features of a tile: "):
        with_budget(model.system, 1, connector="concat")


def test_a_square_image_size_may_be_a_pair(tmp_path):
    path = golden_folder("deepseek_ocr", tmp_path / "folder")
    edit(path, "config.json", ("vision_config", "image_size"), [192, 192])
    assert from_pretrained(path).processor.views.side == 192


def test_null_channels_are_the_defaults(tmp_path):
    path = golden_folder("deepseek_ocr", tmp_path / "folder")
    edit(path, "config.json", ("vision_config", "width", "sam_vit_b", "downsample_channels"), None)
    with pytest.raises(PretrainedError, match="as the last of downsample_channels, got 1024"):
        from_pretrained(path)


@pytest.mark.parametrize("width", [24, {"sam_vit_b": None}])
def test_sizes_of_the_towers_are_objects(tmp_path, width):
    path = golden_folder("deepseek_ocr", tmp_path / "folder")
    edit(path, "config.json", ("vision_config", "width"), width)
    with pytest.raises(PretrainedError, match=r"vision_config\.width: expected an object with the sizes of sam_vit_b"):
        from_pretrained(path)

"""DeepSeek-OCR 2 in both formats: settings that are refused, budgets by its modes, and its visual half alone."""

import jax
import numpy as np
import pytest

from vlm_jax import from_pretrained
from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.checkpoints.saving import save_checkpoint
from vlm_jax.pretrained.budgets import budgeted_views
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.known import known_config, known_folder
from vlm_jax.pretrained.processing import deepseek_ocr2
from vlm_jax.types import WholesAndTiles

from ..cases.inference.folders import edit
from ..contracts.releases import make

SAID = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read."}]}]
NAMES = ("deepseek_ocr2", "DeepseekOCR2")
PORT, RELEASE = NAMES
CONFIG, IMAGES = "config.json", "preprocessor_config.json"
TEXT, SAM, QUERIES = ("text_config",), ("vision_config", "sam_config"), ("vision_config", "width", "qwen2-0-5b")
WRONG = [
    (PORT, CONFIG, (*TEXT, "mlp_layer_types"), ["sparse", "dense", "sparse"], "mlp_layer_types: expected 3"),
    (PORT, CONFIG, (*TEXT, "mlp_layer_types"), ["dense", "sparse"], "mlp_layer_types: expected 3"),
    (PORT, CONFIG, (*TEXT, "attention_bias"), True, r"text_config\.attention_bias: expected False"),
    (PORT, CONFIG, (*SAM, "downsample_channels"), [12, 14], "hidden_size: expected 14, the channels"),
    (PORT, CONFIG, (*SAM, "downsample_channels"), [16], "downsample_channels: expected 2 numbers"),
    (PORT, CONFIG, (*SAM, "downsample_channels"), None, "hidden_size: expected 896, the channels"),
    (PORT, CONFIG, ("vision_config", "encoder_config", "use_sliding_window"), True, "use_sliding_window"),
    (PORT, IMAGES, ("size",), {"height": 24, "width": 16}, "size: expected equal height and width"),
    (PORT, IMAGES, ("size",), {"height": 32, "width": 32}, "a tile of 32x32 pixels has 16 tokens by the processor"),
    (PORT, IMAGES, ("tile_size",), 8, r"a tile of 8x8 pixels has \(1, 1\) tokens by the processor"),
    (RELEASE, CONFIG, ("vision_config", "width"), 24, "width: expected an object with the sizes of sam_vit_b"),
    (RELEASE, CONFIG, (*QUERIES, "dim"), 80, "dim: expected a multiple of 64"),
    (RELEASE, CONFIG, (*QUERIES, "dim"), 128, "dim: expected 64, the channels"),
    (RELEASE, CONFIG, ("projector_config", "input_dim"), 896, r"projector_config\.input_dim: expected 64"),
    (RELEASE, CONFIG, ("projector_config", "projector_type"), "mlp_gelu", "projector_type: expected 'linear'"),
    (RELEASE, "processor_config.json", ("image_size",), 640, "a tile of 640x640 pixels has"),
]


@pytest.mark.parametrize(("name", "file", "path", "value", "message"), WRONG)
def test_settings_that_do_not_fit_are_refused(tmp_path, name, file, path, value, message):
    make(name, tmp_path)
    edit(tmp_path, file, path, value)
    with pytest.raises(PretrainedError, match=message):
        from_pretrained(tmp_path).processor  # noqa: B018


def test_weights_of_experts_are_a_softmax_whatever_the_config_says(tmp_path):
    """The router of transformers reads neither key."""
    module = make(PORT, tmp_path).module
    edit(tmp_path, CONFIG, (*TEXT, "norm_topk_prob"), True)
    edit(tmp_path, CONFIG, (*TEXT, "scoring_func"), "sigmoid")
    assert from_pretrained(tmp_path).module == module


@pytest.mark.parametrize("name", NAMES)
def test_a_large_image_has_tiles_and_a_small_one_none(tmp_path, name):
    model = make(name, tmp_path)
    small, large = (model.processor(SAID, [np.zeros((side, side, 3), np.uint8)]) for side in (16, 40))
    assert isinstance(large.images, WholesAndTiles) and not isinstance(small.images, WholesAndTiles)
    assert (small.visual_index >= 0).sum() == 9 + 1
    assert (large.visual_index >= 0).sum() == 9 + 1 + 4 * large.images.tiles.shape[1]


def test_budgets_by_modes_and_tiles():
    """Modes have 144 and 256 tokens, and each tile 144 more."""
    name = "deepseek-ai/DeepSeek-OCR-2"
    views = deepseek_ocr2.views_release(known_folder(name), known_config(name))
    found = {}
    for budget in (144, 255, 256, 543, 544, 687, 688, 1119, 1120):
        own = budgeted_views(views, budget)
        found[budget] = own.side, 0 if own.mosaic is None else own.mosaic.max_tiles
    small, whole = (768, 0), (1024, 0)
    tiles = {544: (1024, 2), 687: (1024, 2), 688: (1024, 3), 1119: (1024, 5), 1120: (1024, 6)}
    assert found == {144: small, 255: small, 256: whole, 543: whole, **tiles}
    assert budgeted_views(views, 144).stretched and not budgeted_views(views, 256).stretched


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_a_language_model_gives_visual_tokens(tmp_path, name):
    """The learned separator, a row of the language model's input, is kept but not loaded."""
    folder, part = tmp_path / "whole", tmp_path / "part"
    folder.mkdir()
    part.mkdir()
    whole = make(name, folder)
    tensors = {key: np.asarray(tensor[...]) for key, tensor in open_checkpoint(folder).items()}
    language = ("lm_head.", "model.embed_tokens.", "model.layers.", "model.norm.")
    save_checkpoint(part, {key: tensor for key, tensor in tensors.items() if not key.startswith(language)})
    (part / CONFIG).write_text((folder / CONFIG).read_text())
    visual = from_pretrained(part)
    assert visual.module.decoder is None
    jax.tree.map(
        np.testing.assert_array_equal, visual.params, {name: whole.params[name] for name in ("encoder", "connector")}
    )

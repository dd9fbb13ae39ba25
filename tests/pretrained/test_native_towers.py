"""The released configs of Ovis and Qwen-VL: written back unchanged, and rejected where they ask for more."""

import json
import shutil

import numpy as np
import pytest

import vlm_jax
from tests.golden.conftest import DATA
from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.checkpoints.mismatch import CheckpointMismatch
from vlm_jax.pretrained.family import PretrainedError, beside
from vlm_jax.pretrained.ovis import navit
from vlm_jax.pretrained.qwen2_vl import qwen2_5_visual, qwen2_visual

QWEN2_5 = {"hidden_size": 1280, "out_hidden_size": 2048}


@pytest.mark.parametrize("name", ["ovis2", "ovis2_hf", "ovis2_5", "ovis2_5_window"])
def test_what_is_written_back_is_what_was_read(name, tmp_path):
    vlm_jax.from_pretrained(DATA / name).save_pretrained(tmp_path)
    before, after = open_checkpoint(DATA / name), open_checkpoint(tmp_path)
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(after[key][...], before[key][...], err_msg=key)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((DATA / name / "config.json").read_text())


def test_a_layer_too_many_is_an_unused_key(tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(DATA / "ovis2" / file, tmp_path / file)
    config = json.loads((tmp_path / "config.json").read_text())
    backbone = config["visual_tokenizer_config"]["backbone_config"]
    backbone["num_hidden_layers"] -= 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatch, match=rf"unused: .*blocks\.{backbone['num_hidden_layers']}\.norm_1"):
        vlm_jax.from_pretrained(tmp_path)


def test_the_defaults_of_the_released_classes():
    encoder, connector = qwen2_5_visual(QWEN2_5, "vision_config")
    assert (connector.features, connector.factor, connector.norm) == (2048, 2, "rms")
    assert encoder.window == 4 and encoder.full_layers == (7, 15, 23, 31) and encoder.mlp_dim == 3420
    assert (encoder.depth, encoder.num_heads, encoder.patch_dim, encoder.features) == (32, 16, 1176, 1280)
    encoder, connector = qwen2_visual({"hidden_size": 1536}, "vision_config")
    assert encoder.window is None and encoder.mlp_dim == 5120
    assert (connector.features, connector.factor, connector.norm) == (1536, 2, "layer")
    tower = navit({"fullatt_block_indexes": "1|3"}, "vit_config")
    assert tower.full_layers == (1, 3) and tower.window == 3 and tower.table_side == 32
    assert navit({}, "vit_config").window is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "vision_config.hidden_act: expected .*, got 'relu'"),
        ({"patch_size": [14, 16]}, r"vision_config.patch_size: expected a square, got \[14, 16\]"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters.rope_type: expected 'axial' or 'default', got 'yarn'",
        ),
    ],
)
def test_settings_that_nothing_computes_are_refused(change, message):
    with pytest.raises(PretrainedError, match=message):
        qwen2_5_visual({**QWEN2_5, **change}, "vision_config")


@pytest.mark.parametrize("visual", [qwen2_visual, qwen2_5_visual])
def test_default_positions_of_a_tower_are_axial(visual):
    """As in transformers, whose older files have this name."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    assert visual({**QWEN2_5, **rope}, "vision_config") == visual(QWEN2_5, "vision_config")
    other = visual({**QWEN2_5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}, "vision_config")
    assert other[0].rope_theta == 5e3


def test_settings_without_which_there_is_no_size_are_asked_for():
    with pytest.raises(PretrainedError, match="vision_config: expected the keys hidden_size, out_hidden_size"):
        qwen2_5_visual({}, "vision_config")


def test_another_vision_tower_of_ovis_is_refused(tmp_path):
    shutil.copyfile(DATA / "ovis2" / "model.safetensors", tmp_path / "model.safetensors")
    config = json.loads((DATA / "ovis2" / "config.json").read_text())
    config["visual_tokenizer_config"]["backbone_config"]["model_type"] = "siglip_vision_model"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PretrainedError, match=r"backbone_config.model_type: expected 'aimv2'"):
        vlm_jax.from_pretrained(tmp_path)


def test_keys_of_a_part_are_never_ignored_unless_listed():
    assert beside("") == ()
    assert beside("visual.") == (r"(?!visual\.).*",)
    assert beside("visual.", "merger.") == (r"(?!visual\.|merger\.).*",)

"""Released folders of whole systems: what is written back is what was read, under the same names."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from tests.golden.conftest import DATA
from tests.golden.systems.llava import load
from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.pretrained import FAMILIES, internvl
from vlm_jax.pretrained.family import PretrainedError

DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}
BY_THEMSELVES = (
    "deepseek_vl2_ext",
    "internvl12_llama",
    "internvl15_internlm2",
    "internvl2_qwen2",
    "llava_onevision15",
    "ovis2",
    "ovis2_5_window",
    "ovis2_hf",
    "qwen_vl_v1",
)
WITH_A_TOWER = ("llava15", "llava16_anyres", "llava_s2", "mobilevlm_v1", "mobilevlm_v2")  # whose config is elsewhere


@pytest.mark.parametrize("name", [*BY_THEMSELVES, *WITH_A_TOWER])
def test_what_is_written_back_is_what_was_read(name, tmp_path):
    loaded = load(DATA / name) if name in WITH_A_TOWER else vlm_jax.from_pretrained(DATA / name)
    assert (loaded.module.decoder is not None) is (name != "llava_s2")  # which holds no language model
    loaded.save_pretrained(tmp_path)
    before, after = open_checkpoint(DATA / name), open_checkpoint(tmp_path)
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(after[key][...], before[key][...], err_msg=key)
    assert json.loads((tmp_path / "config.json").read_text()) == loaded.config


def test_internvit_alone_is_the_tower_of_a_chat_model(tmp_path):
    chat = vlm_jax.from_pretrained(DATA / "internvl2_qwen2")
    prefix, section = internvl.PREFIX, chat.config["vision_config"]
    tensors = {key.removeprefix(prefix): x[...] for key, x in chat.checkpoint.items() if key.startswith(prefix)}
    np.savez(tmp_path / "model.npz", **tensors)
    alone = vlm_jax.from_pretrained(tmp_path, config=section)
    np.testing.assert_array_equal(
        alone.params["positions"]["table"], chat.checkpoint[f"{prefix}embeddings.position_embedding"][...][0, 1:]
    )
    larger = vlm_jax.from_pretrained(tmp_path, config=section, image_size=2 * section["image_size"])
    assert len(larger.params["positions"]["table"]) == 4 * len(alone.params["positions"]["table"])


def test_the_defaults_of_internvl_are_those_of_the_6b_model():
    vit = internvl.vision_tower({}, "vision_config")
    assert (vit.width, vit.depth, vit.num_heads, vit.mlp_dim, vit.patch_size) == (3200, 48, 25, 12800, 14)
    assert (vit.norm, vit.qk_norm, vit.qk_norm_over, vit.qkv_bias, vit.layer_scale) == (
        "rms",
        "rms",
        "width",
        False,
        0.1,
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "llavaonevision1_5", "vision_config": {"hidden_act": "tanh"}},
            "llavaonevision1_5.vision_config.hidden_act: expected .*, got 'tanh'",
        ),
        ({"model_type": "internvl_chat"}, "internvl_chat: expected the keys vision_config, llm_config"),
        (
            {"model_type": "internvl_chat", "vision_config": {}, "llm_config": {}, "ps_version": "v3"},
            "ps_version: expected 'v1' or 'v2', got 'v3'",
        ),
        ({"model_type": "intern_vit_6b", "norm_type": "batch_norm"}, "norm_type: expected 'rms_norm' or 'layer_norm'"),
        (
            {"model_type": "deepseek_vl_v2", "vision_config": {"class_token": True}, "projector_config": {}},
            "vision_config.class_token: expected False, got True",
        ),
        (
            {"model_type": "deepseek_vl_v2", "vision_config": {}, "projector_config": {"projector_type": "identity"}},
            "projector_config.projector_type: expected 'linear' or",
        ),
    ],
)
def test_settings_that_nothing_computes_are_refused(config, message):
    with pytest.raises(PretrainedError, match=message):
        FAMILIES[config["model_type"]](config, {}, **DTYPES)

"""Presets of released systems: the parts and parameters that the released config of the same size describes."""

import dataclasses
import inspect

import jax
import pytest
import tokenizers
from flax import linen as nn
from ml_collections import ConfigDict

from configs import base
from configs.presets import deepseek_vl, internvl, llava, ovis, qwen_vl, system
from vlm_jax.build import build
from vlm_jax.pretrained.known import describe_known

FILES = {"deepseek_vl": deepseek_vl, "internvl": internvl, "llava": llava, "ovis": ovis, "qwen_vl": qwen_vl}
PARTS = ("encoder", "connector", "decoder")
# How a run is computed, and where the data stand: of no meaning for a release. `combine`: two towers' features
# come one after the other or as a pair, which `hybrid_mlp` takes alike.
FREE = ("parent", "name", "remat", "unroll", "dtype", "param_dtype", "combine")

# Preset -> the name of the release that it retells; see `known.known_configs`.
RELEASES = {
    "llava.llava_1_5_7b": "llava-hf/llava-1.5-7b-hf",
    "llava.llava_1_5_13b": "llava-hf/llava-1.5-13b-hf",
    "llava.llava_1_6_vicuna_7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava.llava_1_6_vicuna_13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava.llava_1_6_mistral_7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava.mobilevlm_v2_1_7b": "mtgv/MobileVLM_V2-1.7B",
    "llava.mobilevlm_v2_3b": "mtgv/MobileVLM_V2-3B",
    "llava.mobilevlm_v2_7b": "mtgv/MobileVLM_V2-7B",
    "qwen_vl.qwen_vl": "Qwen/Qwen-VL",
    "qwen_vl.qwen2_vl_2b": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen_vl.qwen2_vl_7b": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen_vl.qwen2_vl_72b": "Qwen/Qwen2-VL-72B-Instruct",
    "qwen_vl.qwen2_5_vl_3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen_vl.qwen2_5_vl_7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen_vl.qwen2_5_vl_72b": "Qwen/Qwen2.5-VL-72B-Instruct",
    "deepseek_vl.deepseek_vl_1_3b": "deepseek-ai/deepseek-vl-1.3b-base",
    "deepseek_vl.deepseek_vl_7b": "deepseek-ai/deepseek-vl-7b-base",
    "deepseek_vl.deepseek_vl2_tiny": "deepseek-ai/deepseek-vl2-tiny",
    "deepseek_vl.deepseek_vl2_small": "deepseek-ai/deepseek-vl2-small",
    "deepseek_vl.deepseek_vl2_base": "deepseek-ai/deepseek-vl2",
    "internvl.internvl2_5_1b": "OpenGVLab/InternVL2_5-1B",
    "internvl.internvl2_5_2b": "OpenGVLab/InternVL2_5-2B",
    "internvl.internvl2_5_4b": "OpenGVLab/InternVL2_5-4B",
    "internvl.internvl2_5_8b": "OpenGVLab/InternVL2_5-8B",
    "internvl.internvl3_1b": "OpenGVLab/InternVL3-1B",
    "internvl.internvl3_2b": "OpenGVLab/InternVL3-2B",
    "internvl.internvl3_8b": "OpenGVLab/InternVL3-8B",
    "internvl.internvl3_14b": "OpenGVLab/InternVL3-14B",
    "ovis.ovis2_1b": "AIDC-AI/Ovis2-1B",
    "ovis.ovis2_2b": "AIDC-AI/Ovis2-2B",
    "ovis.ovis2_4b": "AIDC-AI/Ovis2-4B",
    "ovis.ovis2_8b": "AIDC-AI/Ovis2-8B",
    "ovis.ovis2_16b": "AIDC-AI/Ovis2-16B",
    "ovis.ovis2_5_2b": "AIDC-AI/Ovis2.5-2B",
    "ovis.ovis2_5_9b": "AIDC-AI/Ovis2.5-9B",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A file with the tokens that any preset names."""
    names = {name for file in FILES.values() for preset in presets(file) for name in tokens(preset())}
    vocabulary = {name: i for i, name in enumerate(sorted(names | {"<pad>", "<bos>", "<eos>", "<image>", "yes"}))}
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="yes")).save(str(path))
    return path


def presets(file):
    return [
        function
        for name, function in inspect.getmembers(file, inspect.isfunction)
        if function.__module__ == file.__name__ and not name.startswith("_")
    ]


def tokens(preset):
    return preset.processor.special_tokens.values()


def configured(preset, tokenizer):
    config = base.get_config()
    system.take(config, preset)
    config.processor.tokenizer = str(tokenizer)
    files = {"train_path": "train.jsonl", "evaluation_path": "evaluation.jsonl"}
    config.data = ConfigDict({"kind": "vqa_files", **files})
    return config


def fields(module):
    """What a module computes, by field."""
    found = {"kind": type(module)}
    for field in dataclasses.fields(module):
        if field.name not in FREE:
            value = getattr(module, field.name)
            found[field.name] = fields(value) if isinstance(value, nn.Module) else value
    if found.get("qk_norm", "") is None:
        del found["qk_norm_over"]  # which then nothing reads
    return found


def named_shapes(boxed):
    """Path -> shape and logical axes of every parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    return {jax.tree_util.keystr(path): (leaf.value.shape, leaf.names) for path, leaf in leaves}


@pytest.mark.parametrize("name", RELEASES)
def test_a_preset_is_its_release(name, tokenizer):
    file, function = name.split(".")
    ours = build(configured(getattr(FILES[file], function)(), tokenizer))
    theirs = describe_known(RELEASES[name])
    for part in PARTS:
        assert fields(getattr(ours.model, part)) == fields(getattr(theirs.module, part)), part
    released = dict(theirs.boxed_shapes())
    rows = released.pop("learned_rows", {})  # stay as released: a run has no place for them
    assert bool(rows) is ("llava_1_6" in name or "deepseek_vl2" in name)
    assert named_shapes(jax.eval_shape(ours.init, jax.random.key(0))) == named_shapes(released)


def test_every_preset_is_compared():
    made = {f"{file}.{function.__name__}" for file, module in FILES.items() for function in presets(module)}
    assert made == set(RELEASES)

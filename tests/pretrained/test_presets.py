"""Presets of released systems: the parts and parameters that the released config of the same size describes."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import pytest
import tokenizers
from flax import linen as nn
from ml_collections import ConfigDict

from configs import base
from configs.presets import deepseek_vl, internvl, llava, ovis, qwen_vl, system
from tests.pretrained.released_configs import SYSTEMS, tensors
from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.loader import choose_family

FILES = {"deepseek_vl": deepseek_vl, "internvl": internvl, "llava": llava, "ovis": ovis, "qwen_vl": qwen_vl}
PARTS = ("encoder", "connector", "decoder")
# How a run is computed, and where the data stand: of no meaning for a release. `combine`: two towers' features
# come one after the other or as a pair, which `hybrid_mlp` takes alike.
FREE = ("parent", "name", "remat", "unroll", "dtype", "param_dtype", "combine")

# Billions of parameters by the releases' pages on the hub.
PUBLISHED = {
    "qwen_vl.qwen2_vl_2b": "2.21",
    "qwen_vl.qwen2_vl_7b": "8.29",
    "qwen_vl.qwen2_vl_72b": "73.4",
    "qwen_vl.qwen2_5_vl_3b": "3.75",
    "qwen_vl.qwen2_5_vl_7b": "8.29",
    "qwen_vl.qwen2_5_vl_72b": "73.4",
    "internvl.internvl2_5_1b": "0.938",
    "internvl.internvl2_5_2b": "2.21",
    "internvl.internvl2_5_4b": "3.71",
    "internvl.internvl2_5_8b": "8.08",
    "internvl.internvl3_1b": "0.938",
    "internvl.internvl3_2b": "2.09",
    "internvl.internvl3_8b": "7.94",
    "internvl.internvl3_14b": "15.1",
    "ovis.ovis2_5_2b": "2.57",
    "ovis.ovis2_5_9b": "9.17",
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


def described(name):
    config, shapes = SYSTEMS[name]
    family = choose_family(config, FAMILIES)
    return family(config, tensors(shapes), dtype=jnp.float32, param_dtype=jnp.float32)


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


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_preset_is_its_release(name, tokenizer):
    file, function = name.split(".")
    ours = build(configured(getattr(FILES[file], function)(), tokenizer))
    theirs = described(name)
    for part in PARTS:
        assert fields(getattr(ours.model, part)) == fields(getattr(theirs.module, part)), part
    released = dict(theirs.boxed_shapes())
    rows = released.pop("learned_rows", {})  # stay as released: a run has no place for them
    assert bool(rows) is ("llava_1_6" in name or "deepseek_vl2" in name)
    assert named_shapes(jax.eval_shape(ours.init, jax.random.key(0))) == named_shapes(released)
    if name in PUBLISHED:
        digits = len(PUBLISHED[name].split(".")[1])
        count = sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(theirs.boxed_shapes())))
        assert f"{count / 1e9:.{digits}f}" == PUBLISHED[name]


def test_every_preset_is_compared():
    made = {f"{file}.{function.__name__}" for file, module in FILES.items() for function in presets(module)}
    assert made == set(SYSTEMS)


@pytest.mark.parametrize(
    ("preset", "tiles", "visual_tokens"),
    [
        (llava.llava_1_5_7b, (1, 1), 576),
        (llava.mobilevlm_v2_1_7b, (1, 1), 144),
        (qwen_vl.qwen_vl, (1, 1), 256),
        (internvl.internvl3_8b, (2, 3), 7 * 256),  # and a thumbnail
        (deepseek_vl.deepseek_vl2_tiny, (1, 2), 3 * 14 * 14),
        (deepseek_vl.deepseek_vl_7b, (1, 1), 576),
        (ovis.ovis2_8b, (1, 1), 256),
        (qwen_vl.qwen2_5_vl_7b, (1, 1), 16_384),
    ],
)
def test_visual_tokens_of_an_image(preset, tiles, visual_tokens, tokenizer):
    config = configured(preset(), tokenizer)
    config.processor.tiles, config.processor.thumbnail = tiles, tiles != (1, 1)
    assert build(config).system.budget.left == visual_tokens


def test_a_vocabulary_is_the_release_s_where_the_decoder_states_one(tokenizer):
    config = configured(llava.llava_1_5_7b(), tokenizer)
    assert build(config).system.model.decoder.vocab_size == 32_064
    config.decoder.vocab_size = 4
    with pytest.raises(ConfigError, match=r"config\.decoder\.vocab_size: 4 is less than the \d+ tokens of"):
        build(config)
    del config.decoder["vocab_size"]
    size = tokenizers.Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    assert build(config).system.model.decoder.vocab_size == size


def test_special_tokens_are_those_of_the_release(tokenizer):
    config = configured(qwen_vl.qwen2_vl_2b(), tokenizer)
    made, backend = build(config).system.processor.tokenizer, tokenizers.Tokenizer.from_file(str(tokenizer))
    assert made.eos_id == backend.token_to_id("<|im_end|>")
    assert made.image_id == backend.token_to_id("<|image_pad|>")
    config.processor.special_tokens = {"end": "</s>"}
    with pytest.raises(ConfigError, match=r"config\.processor\.special_tokens\.end: unknown or unused key"):
        build(config)
    config.processor.tokenizer, config.processor.special_tokens = "digits", {"eos": "</s>"}
    with pytest.raises(ConfigError, match=r"config\.processor\.special_tokens: the built-in tokenizer has its own"):
        build(config)

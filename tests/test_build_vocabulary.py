"""The decoder's vocabulary and the special tokens of a tokenizer's file, from a config."""

import pytest
import tokenizers
from ml_collections import ConfigDict

from configs import base
from vlm_jax.build import build
from vlm_jax.config import ConfigError

from .advice import tried

WORDS = ("<pad>", "<bos>", "<image>", "<|image_pad|>", "<|im_end|>", "yes")
TOKENS = {"pad": "<pad>", "bos": "<bos>", "eos": "<|im_end|>", "image": "<|image_pad|>"}


@pytest.fixture(scope="module")
def backend():
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="yes"))


@pytest.fixture
def config(backend, tmp_path):
    """With a tokenizer from a file."""
    config = base.get_config()
    backend.save(str(tmp_path / "tokenizer.json"))
    config.processor.tokenizer = str(tmp_path / "tokenizer.json")
    config.processor.special_tokens = ConfigDict(TOKENS)
    config.processor.update({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)})
    config.data = ConfigDict(
        {"kind": "conversations", "train_path": "train.jsonl", "evaluation_path": "evaluation.jsonl"}
    )
    return config


def test_a_vocabulary_is_the_config_s_where_it_states_one(config):
    assert build(config).system.model.decoder.vocab_size == len(WORDS)
    config.decoder.vocab_size = 32_064
    assert build(config).system.model.decoder.vocab_size == 32_064
    config.decoder.vocab_size = 4
    with pytest.raises(ConfigError, match=r"config\.decoder\.vocab_size: 4 is less than the \d+ tokens of"):
        build(config)


def test_special_tokens_are_those_of_the_config(config, backend):
    made = build(config).system.processor.tokenizer
    assert made.eos_id == backend.token_to_id("<|im_end|>")
    assert made.id_of(made.names["image_token"]) == backend.token_to_id("<|image_pad|>")
    config.processor.special_tokens = {"end": "</s>"}
    with pytest.raises(ConfigError, match=r"config\.processor\.special_tokens\.end: unknown or unused key"):
        build(config)
    config.processor.tokenizer, config.processor.special_tokens = "digits", {"eos": "</s>"}
    with pytest.raises(
        ConfigError, match=tried("config.processor.special_tokens: the built-in tokenizer has its own; remove")
    ):
        build(config)
    config.processor.special_tokens = {}
    assert build(config).system.processor.tokenizer.eos_id is not None

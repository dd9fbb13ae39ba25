"""How a system's parts are combined: which head, which names, and which systems have no decoder."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained.composition import text_names, text_section
from vlm_jax.pretrained.family import Names
from vlm_jax.pretrained.internvl import describe

DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}
TABLE, OTHER = np.arange(6.0).reshape(3, 2), np.ones((3, 2))
EMBED, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("config", "head", "tied"),
    [
        ({}, None, True),  # as the class says where nothing does
        ({"tie_word_embeddings": False}, None, False),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, None, True),
        ({}, TABLE, True),
        ({}, OTHER, False),  # the checkpoint knows better
        ({"tie_word_embeddings": False}, TABLE, False),
    ],
)
def test_the_head_is_tied_as_transformers_ties_it(config, head, tied):
    checkpoint = {EMBED: TABLE} | ({} if head is None else {HEAD: head})
    section = text_section(config, checkpoint, kind="qwen2", tied=True)
    assert section["tie_word_embeddings"] is tied and section["model_type"] == "qwen2"


def test_names_are_found_where_any_version_puts_them():
    assert text_names({EMBED: TABLE, HEAD: TABLE}) == Names("model.language_model.", "")
    old = {f"language_model.{key}": TABLE for key in ("model.embed_tokens.weight", "lm_head.weight")}
    assert text_names(old) == Names("language_model.model.", "language_model.")


LLM = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 5,
}


@pytest.mark.parametrize(
    ("kind", "key", "whole"),
    [
        ("llama", "language_model.model.norm.weight", True),
        ("llama", "vision_model.embeddings.class_embedding", False),  # files of the visual half alone
        ("phi3", "language_model.model.norm.weight", False),  # a language model that is none of ours
    ],
)
def test_a_system_is_what_its_checkpoint_holds(kind, key, whole):
    config = {"model_type": "internvl_chat", "vision_config": {}, "llm_config": {**LLM, "model_type": kind}}
    told = pytest.warns(UserWarning, match="'phi3' is not read") if kind == "phi3" else contextlib.nullcontext()
    with told:
        described = describe(config, {key: np.zeros(8)}, **DTYPES)
    assert isinstance(described.module, VLM) and (described.module.decoder is not None) is whole
    assert any(rule.targets[0].startswith("decoder/") for rule in described.rules) is whole

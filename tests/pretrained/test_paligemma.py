"""Configs of PaliGemma and of Gemma's language models: class defaults, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.language import language_model
from vlm_jax.pretrained.paligemma import describe

DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}
KEYS = (
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "multi_modal_projector.linear.weight",
    "language_model.model.embed_tokens.weight",
)
NAMES = {key: np.zeros(1, np.float32) for key in KEYS}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vision_use_head": False}
TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def described(**changes):
    config = {"model_type": "paligemma", "vision_config": VISION, "text_config": TEXT, "projection_dim": 32}
    return describe({**config, **changes}, NAMES, **DTYPES).module


def test_defaults_are_those_of_the_classes():
    decoder = described().decoder
    assert (decoder.head_dim, decoder.activation, decoder.norm, decoder.post_norm) == (
        256, "gelu_tanh", "rms_from_one", False,
    )  # fmt: skip
    assert (decoder.attention_softcap, decoder.logit_softcap, decoder.windows, decoder.qk_scale) == (
        None,
        None,
        (),
        None,
    )
    decoder = described(text_config={**TEXT, "model_type": "gemma2"}).decoder
    assert (decoder.attention_softcap, decoder.logit_softcap, decoder.post_norm) == (50.0, 30.0, True)
    assert decoder.windows == (4096, None, 4096) and decoder.qk_scale == 256**-0.5 and decoder.tie_embeddings
    assert decoder.embedding_scale == 32**0.5


@pytest.mark.parametrize("stated", [True, False])
def test_the_prefix_does_not_follow_a_setting(stated):
    assert described(text_config={**TEXT, "use_bidirectional_attention": stated}) == described()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"projection_dim": 2048}, "paligemma.projection_dim: expected the width of the language model, 32 "),
        ({"text_config": {**TEXT, "model_type": "llama"}}, "paligemma.text_config.model_type: expected 'gemma' or"),
        (
            {"vision_config": {**VISION, "model_type": "clip_vision_model"}},
            "vision_config.model_type: expected 'siglip_",
        ),
        (
            {"text_config": {**TEXT, "model_type": "gemma2", "attn_logit_softcapping": 0}},
            "attn_logit_softcapping: expected a positive number or null, got 0",
        ),
        (
            {"text_config": {**TEXT, "model_type": "gemma2", "sliding_window": None}},
            "sliding_window: layers of sliding_attention need a positive number",
        ),
    ],
)
def test_what_is_not_read_is_refused(changes, told):
    with pytest.raises(PretrainedError, match=told):
        described(**changes)


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_a_language_model_alone_is_causal(kind):
    with pytest.raises(PretrainedError, match="use_bidirectional_attention: expected False or None, got True"):
        language_model({**TEXT, "model_type": kind, "use_bidirectional_attention": True}, {}, "config", **DTYPES)


def test_without_caps():
    text = {**TEXT, "model_type": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": None}
    decoder = language_model(text, {}, "config", **DTYPES).decoder
    assert (decoder.attention_softcap, decoder.logit_softcap) == (None, None)

"""Text configs as they are released: heads that are tied, and settings that nothing computes."""

import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.language import language_model

DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}
TINY = {
    "model_type": "llama",
    "vocab_size": 5,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SHAPES = {
    "model.embed_tokens.weight": (5, 4),
    "model.norm.weight": (4,),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.0.post_attention_layernorm.weight": (4,),
    **{f"model.layers.0.self_attn.{name}_proj.weight": (4, 4) for name in "qkvo"},
    "model.layers.0.mlp.gate_proj.weight": (6, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.0.mlp.down_proj.weight": (4, 6),
}


def saved(folder, **more):
    rng = np.random.default_rng(0)
    tensors = {key: rng.normal(size=shape).astype(np.float32) for key, shape in SHAPES.items()}
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].copy(), **more}
    np.savez(folder / "model.npz", **tensors)
    return tensors


def test_a_tied_table_that_is_stored_twice_is_written_twice(tmp_path):
    tensors = saved(tmp_path, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32)})
    loaded = vlm_jax.from_pretrained(tmp_path, config={**TINY, "tie_word_embeddings": True})
    assert set(loaded.params["decoder"]) == {"embedding", "blocks", "final_norm"}
    loaded.params["decoder"]["embedding"]["embedding"] += 1
    loaded.save_pretrained(tmp_path / "back")
    written = np.load(tmp_path / "back" / "model.npz")
    assert set(written) == set(tensors)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_array_equal(written[key], tensors["lm_head.weight"] + 1)


def test_a_tied_head_that_is_not_the_table_is_refused(tmp_path):
    saved(tmp_path, **{"lm_head.weight": np.zeros((5, 4), np.float32)})
    with pytest.raises(PretrainedError, match=r"llama\.tie_word_embeddings: expected lm_head.weight to be model.embed"):
        vlm_jax.from_pretrained(tmp_path, config={**TINY, "tie_word_embeddings": True})
    untied = vlm_jax.from_pretrained(tmp_path, config=TINY)
    assert not np.asarray(untied.params["decoder"]["head"]["kernel"]).any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {**TINY, "model_type": "lama"},
            "text_config.model_type: no language model 'lama' here; did you mean 'llama'?",
        ),
        ({"vocab_size": 3}, "text_config: expected the key model_type"),
        ({**TINY, "attention_bias": True}, "text_config.attention_bias: expected False, got True"),
        ({**TINY, "hidden_act": "gelu"}, "text_config.hidden_act: expected 'silu', got 'gelu'"),
    ],
)
def test_settings_that_nothing_computes_are_refused(config, message):
    with pytest.raises(PretrainedError) as error:
        language_model(config, {}, "text_config", **DTYPES)
    assert message in str(error.value)

"""Text configs as they are released: heads that are tied, and settings that nothing computes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import vlm_jax
from tests.golden.conftest import DATA
from vlm_jax.checkpoints.hub import open_checkpoint, read_config
from vlm_jax.checkpoints.params import import_params
from vlm_jax.checkpoints.saving import save_checkpoint
from vlm_jax.decoders.mixed import BlockKind
from vlm_jax.layers.rope import Rope
from vlm_jax.pretrained.family import Names, PretrainedError
from vlm_jax.pretrained.language import language_model

from ..advice import tried

DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}
TINY = {
    "model_type": "llama",
    "vocab_size": 5,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
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
    with pytest.raises(
        PretrainedError, match=tried("{lm_head.weight} to be {model.embed_tokens.weight}, but they differ; set it")
    ):
        vlm_jax.from_pretrained(tmp_path, config={**TINY, "tie_word_embeddings": True})
    untied = vlm_jax.from_pretrained(tmp_path, config={**TINY, "tie_word_embeddings": False})
    assert not np.asarray(untied.params["decoder"]["head"]["kernel"]).any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {**TINY, "model_type": "lama"},
            "text_config.model_type: unsupported language model 'lama'; did you mean 'llama'?",
        ),
        ({"vocab_size": 3}, "text_config: expected the key model_type"),
        ({**TINY, "hidden_act": "tanh"}, "text_config.hidden_act: expected 'gelu' or"),
        ({**TINY, "hidden_size": "4"}, "text_config.hidden_size: expected a positive integer, got '4'"),
        ({**TINY, "num_hidden_layers": None}, "text_config.num_hidden_layers: expected a positive integer, got None"),
        ({**TINY, "num_key_value_heads": 3}, "heads: expected a divisor of num_attention_heads, 2, got 3"),
        (
            {**TINY, "num_attention_heads": 3, "num_key_value_heads": None},
            "text_config.num_attention_heads: expected a divisor of hidden_size, 4, or the key head_dim, got 3",
        ),
        (
            {**TINY, "head_dim": 3},
            "text_config.head_dim: expected an even number, for rotary positions, got 3",
        ),
        (
            {**TINY, "rope_scaling": {"type": "ntk"}},
            "text_config.rope_scaling.rope_type: expected 'default' or 'mrope' or 'linear'",
        ),
        ({**TINY, "rope_scaling": {"type": "linear"}}, "text_config.rope_scaling: 'linear' needs the key 'factor'"),
        ({**TINY, "rope_scaling": "dynamic"}, "rope_scaling: expected a set of settings or null, got 'dynamic'"),
        (
            {**TINY, "rope_scaling": {"type": "linear", "factor": None}},
            "text_config.rope_scaling: expected numbers and lists of numbers for 'linear', got",
        ),
        (
            {**TINY, "rope_scaling": {"type": "longrope", "short_factor": [1, 2], "long_factor": [3, 4]}},
            "text_config.rope_scaling: longrope: expected 1 factors, one for each angle, got 2 for short",
        ),
        (
            {**TINY, "model_type": "qwen2_vl_text"},
            "text_config.rope_parameters: M-RoPE sections (16, 24, 24) are for 64 angles, not 1",
        ),
        ({**TINY, "partial_rotary_factor": 0.5}, "text_config.partial_rotary_factor: expected None or 1.0, got 0.5"),
        (
            {**TINY, "rope_parameters": {"partial_rotary_factor": 0.5}},
            "text_config.rope_parameters.partial_rotary_factor: expected None or 1.0, got 0.5",
        ),
        (
            {**TINY, "rope_parameters": {"full_attention": {}, "sliding_attention": {}}},
            "expected one set of settings, got one per full_attention, sliding_attention",
        ),
        (
            {**TINY, "model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked_attention"]},
            "text_config.layer_types[0]: expected 'full_attention' or 'sliding_attention', got 'chunked_attention'",
        ),
        (
            {**TINY, "model_type": "qwen2", "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
            "text_config.layer_types: expected 1, one per layer, got 2",
        ),
        ({**TINY, "model_type": "internlm2"}, "text_config.bias: expected False, got True"),
        ({**TINY, "model_type": "qwen"}, "text_config: expected the key seq_length"),
    ],
)
def test_settings_that_nothing_computes_are_refused(config, message):
    with pytest.raises(PretrainedError) as error:
        language_model(config, {}, "text_config", **DTYPES)
    assert message in str(error.value)


def rope_of(**config):
    return language_model({**TINY, **config}, {}, "text_config", **DTYPES).decoder.rope


def test_old_and_new_forms_of_rotary_settings_are_the_same():
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32}
    expected = Rope(5e5, "yarn", factor=4.0, original_length=32)
    assert rope_of(rope_theta=5e5, rope_scaling={"type": "yarn", **yarn}) == expected
    assert rope_of(rope_theta=5e5, rope_scaling={"rope_type": "yarn", **yarn}) == expected
    assert rope_of(rope_parameters={"rope_theta": 5e5, "rope_type": "yarn", **yarn}) == expected
    divided = {"type": "yarn", "original_max_position_embeddings": 32}
    assert rope_of(rope_theta=5e5, max_position_embeddings=128, rope_scaling=divided) == expected
    assert rope_of(rope_scaling={"type": "linear", "factor": 2}) == Rope(scaling="linear", factor=2.0)
    assert rope_of() == rope_of(rope_parameters={"rope_theta": 10_000, "rope_type": "default"}) == Rope()


def test_sections_of_m_rope_in_every_layout():
    text = {**TINY, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 128}
    old = {"type": "mrope", "mrope_section": [16, 24, 24]}
    new = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    expected = Rope(1e6, sections=(16, 24, 24))
    for kind in ("qwen2_vl", "qwen2_5_vl"):
        for config in (
            {**text, "model_type": kind, "rope_theta": 1e6, "rope_scaling": old, "vision_config": {}},
            {"model_type": kind, "text_config": {**text, "rope_parameters": new}, "tie_word_embeddings": True},
            {**text, "model_type": f"{kind}_text"},
        ):
            decoder = language_model(config, {}, "config", **DTYPES).decoder
            assert decoder.rope == expected
            assert decoder.tie_embeddings == ("tie_word_embeddings" in config)
            assert decoder.qkv_bias and decoder.vocab_size == 5


def test_windows_of_layers_as_released():
    qwen2 = {**TINY, "model_type": "qwen2", "num_hidden_layers": 3, "sliding_window": 8}
    mistral = {**TINY, "model_type": "mistral", "num_hidden_layers": 2}
    for config, expected in (
        ({**qwen2, "max_window_layers": 1}, ()),
        ({**qwen2, "max_window_layers": 1, "use_sliding_window": True}, (None, 8, 8)),
        ({**qwen2, "max_window_layers": 3, "use_sliding_window": True}, ()),
        (mistral, (4096, 4096)),
        ({**mistral, "sliding_window": None}, ()),
        # Keys that a class does not look at.
        ({**mistral, "use_sliding_window": False, "layer_types": ["full_attention"] * 2}, (4096, 4096)),
        ({**TINY, "use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"]}, ()),
    ):
        assert language_model(config, {}, "config", **DTYPES).decoder.windows == expected


def test_gemma_3_of_older_and_of_newer_files():
    text = {**TINY, "model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window": 8}
    scaling = {"rope_type": "linear", "factor": 8.0}
    kinds = ["sliding_attention", "full_attention"] * 2
    old = {"sliding_window_pattern": 2, "rope_scaling": scaling, "rope_theta": 1e5, "rope_local_base_freq": 100}
    both = {
        "full_attention": {**scaling, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    for more in (old, {"layer_types": kinds, "rope_parameters": both}):
        decoder = language_model({**text, **more}, {}, "config", **DTYPES).decoder
        assert decoder.windows == (8, None, 8, None)
        assert (decoder.rope, decoder.local_rope) == (Rope(1e5, "linear", factor=8.0), Rope(100.0))
    decoder = language_model(text, {}, "config", **DTYPES).decoder  # every sixth layer would be global
    assert decoder.windows == (8,) * 4 and (decoder.rope, decoder.local_rope) == (Rope(), None)
    only = {"layer_types": ["full_attention"] * 4, "sliding_window": None}
    decoder = language_model({**text, **only}, {}, "config", **DTYPES).decoder
    assert decoder.windows == () and (decoder.rope, decoder.local_rope) == (Rope(1e6), None)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    for more, told in (
        ({"rope_parameters": {"rope_type": "default"}}, "expected a set of settings for full_attention and for slid"),
        ({"rope_parameters": {"full_attention": yarn}, "layer_types": kinds}, "one attention factor of both kinds"),
        ({"rope_scaling": {"rope_type": "linear"}}, "full_attention.rope_parameters: 'linear' needs the key 'factor'"),
        ({"layer_types": kinds[:3]}, "layer_types: expected 4, one per layer, got 3"),
        ({"sliding_window": None}, "sliding_window: layers of sliding_attention need a positive number, got None"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: expected None, got 30.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: expected False or None, got True"),
    ):
        with pytest.raises(PretrainedError, match=told):
            language_model({**text, **more}, {}, "config", **DTYPES)


def test_gemma_4_of_released_and_of_newer_files():
    """The release names the heads of global layers; files that transformers writes name those of every layer."""
    text = {**TINY, "model_type": "gemma4_text", "num_hidden_layers": 4, "sliding_window": 8, "head_dim": 2}
    text |= {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_attention_heads": 2}
    types = ["sliding_attention", "full_attention"] * 2
    released = {"layer_types": types, "global_head_dim": 6, "num_global_key_value_heads": 1}
    both = {str(number): {"head_dim": 6, "num_key_value_heads": 1} for number in (1, 3)}
    local = BlockKind(2, text["num_key_value_heads"], Rope(10_000.0), 8)
    whole = BlockKind(6, 1, Rope(1e6, "proportional", rotated_share=0.25), None, True, False)
    for more in (released, {"layer_types": types, "per_layer_config": both}):
        decoder = language_model({**text, **more}, {}, "config", **DTYPES).decoder
        assert decoder.kinds == (local, whole) and decoder.order == (0, 1, 0, 1) and decoder.windows == (8, None) * 2
    # Null is no default: layers have equal heads, as in transformers.
    decoder = language_model({**text, **released, "per_layer_config": None}, {}, "config", **DTYPES).decoder
    assert [(kind.head_dim, kind.num_kv_heads) for kind in decoder.kinds] == [(2, text["num_key_value_heads"])] * 2
    decoder = language_model({**text, "layer_types": ["sliding_attention"] * 4}, {}, "config", **DTYPES).decoder
    assert decoder.order == (0, 0, 0, 1)  # the last layer is global, whatever is stated
    shared = {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 8}
    found = language_model({**text, **released, **shared}, {}, "config", **DTYPES)
    wide = {"mlp_dim": 2 * text["intermediate_size"]}
    reading = [dataclasses.replace(kind, shares_with=index, **wide) for index, kind in enumerate((local, whole))]
    assert found.decoder.kinds == (local, whole, *reading) and found.decoder.order == (0, 1, 2, 3)
    assert found.decoder.own_input_dim == 8
    for layer, name, unread in ((1, "k_proj", False), (2, "k_proj", True), (3, "v_norm", True), (3, "q_proj", False)):
        key = f"model.layers.{layer}.self_attn.{name}.weight"
        assert any(re.fullmatch(pattern, key) for pattern in found.ignore) == unread
    moe = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 3}
    for more, told in (
        ({"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 4}, "expected a row for each of .* ids"),
        ({"hidden_size_per_layer_input": 8, "pad_token_id": -1}, "pad_token_id: expected the row of visual tokens, 0 "),
        (
            {"num_kv_shared_layers": 3, "layer_types": types},
            "_shared_layers: expected earlier layers of full_att",
        ),
        ({"num_kv_shared_layers": 5}, "expected earlier layers of full_attention and sliding_attention"),
        (
            {"num_kv_shared_layers": 2, "layer_types": types, "per_layer_config": {"3": {"head_dim": 4}}},
            r"per_layer_config.3.head_dim: expected 2, as layer 1, whose keys this layer reads, got 4",
        ),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention: expected None or 'vision', got 'all'"),
        ({"layer_types": types[:3]}, "layer_types: expected 4, one per layer, got 3"),
        ({"sliding_window": None}, "sliding_window: layers of sliding_attention need a positive number, got None"),
        ({"per_layer_config": {"4": {}}}, "per_layer_config: expected numbers of layers from 0 to 3, got '4'"),
        ({"per_layer_config": {"3": {"a": 1}}}, "per_layer_config.3: expected an object with head_dim and num_key"),
        ({"rope_parameters": {"sliding_attention": None}}, "expected a set of settings for sliding_attention"),
        ({**moe, "num_experts": None}, "enable_moe_block needs the keys num_experts, got null"),
        ({**moe, "top_k_experts": 5}, "top_k_experts: expected at most num_experts, 4, got 5"),
    ):
        with pytest.raises(PretrainedError, match=told):
            language_model({**text, **more}, {}, "config", **DTYPES)


def test_the_layers_of_qwen3_5_follow_the_config():
    """A list of kinds wins over the interval; layers that predict several tokens are named, to be left unread."""
    rope = {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5, "rope_theta": 1e7}
    text = {**TINY, "model_type": "qwen3_5_text", "num_hidden_layers": 4, "head_dim": 16, "rope_parameters": rope}
    for more, mixers in (
        ({}, ("delta", "delta", "delta", "attention")),
        ({"full_attention_interval": 2}, ("delta", "attention") * 2),
        ({"layer_types": ["full_attention"] + ["linear_attention"] * 3}, ("attention", "delta", "delta", "delta")),
    ):
        found = language_model({**text, **more}, {}, "config", **DTYPES)
        assert found.decoder.mixers == mixers and found.decoder.rotary_width == 8
        assert found.decoder.rope == Rope(1e7, sections=(2, 1, 1), interleaved=True)
        assert any(re.fullmatch(pattern, "mtp.layers.0.mlp.up_proj.weight") for pattern in found.ignore)
    for more, told in (
        ({"layer_types": ["linear_attention"] * 3}, "layer_types: expected 4, one per layer, got 3"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"full_attention_interval": 0}, "full_attention_interval: expected a positive integer, got 0"),
        ({"linear_num_key_heads": 3}, "linear_num_key_heads: expected a divisor of linear_num_value_heads, 32, got 3"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim: expected a positive integer, got 0"),
        (
            {"rope_parameters": {**rope, "partial_rotary_factor": 0.1}},
            r"config\.rope_parameters\.partial_rotary_factor: .* an even number of the 16 coordinates",
        ),
        ({"rope_parameters": {}, "partial_rotary_factor": 0.1}, r"config\.partial_rotary_factor: .* an even number"),
    ):
        with pytest.raises(PretrainedError, match=told):
            language_model({**text, **more}, {}, "config", **DTYPES)


def test_the_experts_of_qwen3_5_follow_the_config():
    """The width of the shared expert is its own; every layer has experts, so there is no `intermediate_size`."""
    experts = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}
    experts |= {"num_experts": 6, "num_experts_per_tok": 2}
    text = {**TINY, "model_type": "qwen3_5_moe_text", "intermediate_size": None, **experts}
    decoder = language_model(text, {}, "config", **DTYPES).decoder
    assert (decoder.mlp_dim, decoder.expert_dim, decoder.num_experts, decoder.num_selected) == (12, 8, 6, 2)
    stored = {"model.layers.0.mlp.experts.0.down_proj.weight": np.zeros((1, 1), np.float32)}
    for checkpoint, source in (({}, "experts.gate_up_proj"), (stored, "experts.{expert}.gate_proj.weight")):
        rules = language_model(text, checkpoint, "config", **DTYPES).rules
        assert any(key.endswith(source) for rule in rules for key in rule.sources)
    for more, told in (
        ({"num_experts_per_tok": 7}, "config.num_experts_per_tok: expected at most num_experts, 6, got 7"),
        ({"num_experts": None}, "config.num_experts: expected a positive integer, got None"),
        ({"moe_intermediate_size": 0}, "config.moe_intermediate_size: expected a positive integer, got 0"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size: expected a positive integer, got 0"),
    ):
        with pytest.raises(PretrainedError, match=told):
            language_model({**text, **more}, {}, "config", **DTYPES)


def test_biases_of_the_classes_that_have_a_switch():
    both = {"attention_bias": True, "mlp_bias": True}
    for kind, more, expected in (
        ("llama", both, (True, True, True)),
        ("llama", {}, (False, False, False)),
        ("mistral", both, (False, False, False)),
        ("qwen2", both, (True, False, False)),
        ("qwen3", both, (True, True, False)),
        ("qwen3", {}, (False, False, False)),
    ):
        decoder = language_model({**TINY, "model_type": kind, **more}, {}, "config", **DTYPES).decoder
        assert (decoder.qkv_bias, decoder.out_bias, decoder.mlp_bias) == expected, kind


def test_deepseek_scales_logits_by_the_rotary_settings_that_are_in_force():
    """By modeling_deepseek_v2.py, yarn_apply_mscale."""
    deepseek = {**TINY, "model_type": "deepseek_v2", "max_position_embeddings": 40}
    yarn = {"type": "yarn", "original_max_position_embeddings": 10, "mscale_all_dim": 0.5}
    expected = (0.05 * np.log(4) + 1) ** 2
    for scaling, scale in (
        ({**yarn, "factor": 4.0}, expected),
        ({**yarn, "factor": None}, expected),
        ({**yarn, "mscale_all_dim": 0.0}, 1.0),
        ({"type": "default", "mscale_all_dim": 0.5, "factor": 4.0}, 1.0),
    ):
        decoder = language_model({**deepseek, "rope_scaling": scaling}, {}, "config", **DTYPES).decoder
        assert decoder.logit_scale == pytest.approx(scale)


# Folders with the language model of a whole system, and what is before its keys.
GOLDEN = {
    "qwen_vl_v1": (Names("transformer."), ("text_short", "text_long")),
    "internvl15_internlm2": (Names("language_model.model.", "language_model."), ("text", "long")),
}


@functools.cache
def golden(folder):
    config, checkpoint = read_config(DATA / folder), open_checkpoint(DATA / folder)
    found = language_model(config.get("llm_config", config), checkpoint, folder, names=GOLDEN[folder][0], **DTYPES)
    row = jnp.zeros((1, 1), jnp.int32)
    init = functools.partial(found.decoder.init, method=logits)
    params = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), row, row, row))
    read = {key for rule in found.rules for key in checkpoint if _reads(rule, key)}
    tensors = {key: checkpoint[key] for key in read}
    return found.decoder, {"params": import_params(found.rules, tensors, params["params"])}


def _reads(rule, key):
    return any(re.fullmatch(re.sub(r"\{\w+\}", r"\\d+", template), key) for template in rule.sources)


def logits(decoder, tokens, positions, segments, cache=None):
    hidden, cache = decoder(decoder.embed(tokens), positions, segments, cache)
    return decoder.logits(hidden), cache


def run(folder, tokens, cache=None, start=0):
    decoder, params = golden(folder)
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1])[None], tokens.shape)
    apply = jax.jit(functools.partial(decoder.apply, method=logits))
    return apply(params, jnp.asarray(tokens, jnp.int32), positions, jnp.ones(tokens.shape, jnp.int32), cache)


@pytest.mark.parametrize(("folder", "case"), [(f, case) for f, (_, cases) in GOLDEN.items() for case in cases])
def test_logits_of_texts_are_those_of_the_release(folder, case):
    cases = np.load(DATA / folder / "cases.npz")
    expected = cases[f"{case}_logits"]
    got = run(folder, cases[f"{case}_ids"])[0][:, -expected.shape[1] :]
    np.testing.assert_allclose(got, expected, atol=5e-5)


def test_a_short_prompt_of_qwen_that_grows_keeps_its_angles_and_scales_its_queries():
    """Greedy ids of the release with a cache, for a prompt that crosses `seq_length` and one that is beyond."""
    cases = np.load(DATA / "qwen_vl_v1" / "cases.npz")
    for case in ("text_short", "text_long"):
        ids, expected = cases[f"{case}_ids"][:1], cases[f"{case}_greedy_cache"]
        cache = golden("qwen_vl_v1")[0].init_cache(1, ids.shape[1] + len(expected))
        out, cache = run("qwen_vl_v1", ids, cache)
        found = [int(out[0, -1].argmax())]
        for step in range(len(expected) - 1):
            out, cache = run("qwen_vl_v1", np.array([found[-1:]]), cache, ids.shape[1] + step)
            found.append(int(out[0, -1].argmax()))
        assert found == expected.tolist()
    assert not np.array_equal(expected, cases["text_long_greedy_recompute"])  # where angles follow the length so far


def test_a_qwen_without_vision_is_a_language_model_alone(tmp_path):
    whole, config = open_checkpoint(DATA / "qwen_vl_v1"), read_config(DATA / "qwen_vl_v1")
    save_checkpoint(tmp_path, {key: whole[key][...] for key in whole if ".visual." not in key})
    del config["visual"]
    alone = vlm_jax.from_pretrained(tmp_path, config=config)
    assert alone.module.encoder is None
    jax.tree.map(np.testing.assert_array_equal, alone.params["decoder"], golden("qwen_vl_v1")[1]["params"])

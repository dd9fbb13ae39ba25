"""Tiny random language models of transformers: logits through files and rules, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import vlm_jax
from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.checkpoints.saving import save_checkpoint
from vlm_jax.types import Batch

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Sequences here are longer than the 8 positions of training.
ORIGINAL = {"original_max_position_embeddings": 8}
SCALED = {
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 500.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "rope_theta": 100.0,
            **ORIGINAL,
        }
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}},
    "yarn, all settings": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 2.0,
            "beta_slow": 0.5,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
            "truncate": False,
            "rope_theta": 10.0,
            **ORIGINAL,
        }
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "long_factor": [1.5, 3.0, 5.0, 8.0],
            **ORIGINAL,
        },
    },
}
# class of the model, and its settings other than the sizes
MODELS = {
    "llama": (transformers.LlamaForCausalLM, {}),
    "llama, tied": (transformers.LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama, biases": (
        transformers.LlamaForCausalLM,
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    ),
    **{f"llama, {name}": (transformers.LlamaForCausalLM, settings) for name, settings in SCALED.items()},
    "mistral": (transformers.MistralForCausalLM, {"sliding_window": 4}),
    "qwen2": (transformers.Qwen2ForCausalLM, {}),
    "qwen2, upper layers with windows": (
        transformers.Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "qwen2, a layer with a window": (
        transformers.Qwen2ForCausalLM,
        {
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "qwen3": (transformers.Qwen3ForCausalLM, {"head_dim": 12}),
}
LENGTH, PROMPT = 12, 7


def randomised(model):
    """The model with random parameters, biases and scales among them; what it says does not go in circles."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.3 if "norm" in name else 0.5)
    return model.eval()


def made(name):
    cls, settings = MODELS[name]
    return randomised(cls(cls.config_class(**{**SIZES, **settings})))


def text(positions=None, rows=2):
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], size=(rows, LENGTH), dtype=np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1)) if positions is None else positions
    return Batch(ids, positions, np.ones_like(ids), np.full_like(ids, -1))


def their_logits(model, ids, **inputs):
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long), **inputs).logits.numpy()


def their_steps(model, ids):
    """Logits of a prompt and of single tokens after it, through the cache."""
    cache = transformers.DynamicCache(config=model.config)
    spans = [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, LENGTH))]
    steps = [their_logits(model, ids[:, a:b], cache=cache, use_cache=True) for a, b in spans]
    return np.concatenate(steps, axis=1)


def our_steps(ours, batch):
    """The same with our cache, which has more slots than are used."""
    decoder, params = ours.module.decoder, {"params": ours.params["decoder"]}

    @jax.jit
    def run(tokens, positions, cache):
        def logits(module):
            hidden, updated = module(module.embed(tokens), positions, jnp.ones_like(tokens), cache)
            return module.logits(hidden), updated

        return decoder.apply(params, method=logits)

    cache, steps = decoder.init_cache(len(batch.tokens), LENGTH + 3), []
    for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, LENGTH))]:
        logits, cache = run(batch.tokens[:, start:stop], batch.positions[:, start:stop], cache)
        steps.append(logits)
    return np.concatenate(steps, axis=1)


def check(ours, theirs):
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("name", MODELS)
def test_logits_whole_and_step_by_step_and_back(name, tmp_path):
    model, batch = made(name), text()
    model.save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    expected = their_logits(model, batch.tokens)
    check(jax.jit(ours.apply)(batch), expected)
    check(our_steps(ours, batch), their_steps(made(name), batch.tokens))
    ours.save_pretrained(tmp_path / "ours")
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(their_logits(again, batch.tokens), expected)


@pytest.mark.parametrize("name", ["llama", "llama, linear", "llama, llama3", "llama, yarn"])
def test_angles_at_positions_far_away(name, tmp_path):
    """An angle of a far position has the rounding of its frequency, many times over."""
    model = made(name)
    model.save_pretrained(tmp_path)
    rope, positions = vlm_jax.from_pretrained(tmp_path).module.decoder.rope, np.array([[1000, 32_767, 131_071]])
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor(positions))
    angles = rope.angles(jnp.asarray(positions), 8)
    np.testing.assert_allclose(rope.magnitude * np.cos(angles), cos[..., :4], atol=1e-4)
    np.testing.assert_allclose(rope.magnitude * np.sin(angles), sin[..., :4], atol=1e-4)


# Text, an image of 2 x 3 visual tokens, and text again.
M_ROPE = np.array(
    [[i, i, i] for i in range(3)]
    + [[3, 3 + row, 3 + col] for row in range(2) for col in range(3)]
    + [[i, i, i] for i in range(6, 9)],
    dtype=np.int32,
)
VISION = {"depth": 1, "embed_dim": 8, "num_heads": 1, "hidden_size": 32, "in_channels": 3}
VISION_2_5 = {"depth": 1, "hidden_size": 8, "num_heads": 1, "out_hidden_size": 32, "intermediate_size": 8}
SYSTEMS = {
    "qwen2_vl": (transformers.Qwen2VLForConditionalGeneration, VISION),
    "qwen2_5_vl": (transformers.Qwen2_5_VLForConditionalGeneration, VISION_2_5),
}


def made_system(kind, scaling):
    cls, vision = SYSTEMS[kind]
    section = {**SIZES, "rope_parameters": {"mrope_section": [1, 1, 2], "rope_theta": 1000.0, **scaling}}
    return randomised(cls(cls.config_class(text_config=section, vision_config=vision)))


def loaded_text(model, folder):
    """Our language model of a system of transformers, and the tensors that it was read from."""
    tensors = {key.replace("language_model.", ""): tensor for key, tensor in model.state_dict().items()}
    tensors = {key: tensor.numpy() for key, tensor in tensors.items() if "visual" not in key}
    save_checkpoint(folder, tensors)
    return vlm_jax.from_pretrained(folder, config=model.config.text_config.to_dict()), tensors


@pytest.mark.parametrize("kind", SYSTEMS)
@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}])
def test_text_models_with_positions_on_three_axes(kind, scaling, tmp_path):
    model, batch = made_system(kind, scaling), text(np.tile(M_ROPE, (2, 1, 1)))
    axes_first = torch.tensor(batch.positions.transpose(2, 0, 1), dtype=torch.long)
    expected = their_logits(model, batch.tokens, position_ids=axes_first)
    ours, tensors = loaded_text(model, tmp_path)
    assert ours.config["model_type"] == f"{kind}_text"
    check(jax.jit(ours.apply)(batch), expected)
    check(our_steps(ours, batch), expected)
    ours.save_pretrained(tmp_path / "ours")
    written = open_checkpoint(tmp_path / "ours")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[key][...], tensor) for key, tensor in tensors.items())

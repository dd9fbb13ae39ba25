"""Tower and projector of tiny random LLaVA and InternVL models of transformers with settings of their own, and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import vlm_jax
from vlm_jax.pretrained.family import PretrainedError

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 12,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 20,
}
LLAVA = {"vision_config": {**VISION, "model_type": "clip_vision_model"}, "text_config": {**TEXT, "model_type": "llama"}}
RMS = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": True}


def internvl(**vision):
    return {"vision_config": {**VISION, **vision}, "text_config": {**TEXT, "model_type": "qwen2"}}


CASES = {
    "llava with the class token of layer 1": (
        "LlavaForConditionalGeneration",
        {**LLAVA, "vision_feature_layer": 1, "vision_feature_select_strategy": "full"},
        17,
    ),
    "internvl, its table interpolated": ("InternVLForConditionalGeneration", internvl(image_size=32), 4),
    "internvl with RMSNorm": ("InternVLForConditionalGeneration", internvl(**RMS), 4),
    "internvl at a quarter": ("InternVLForConditionalGeneration", {**internvl(), "downsample_ratio": 0.25}, 1),
}


def made(name, sections):
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**sections)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


@pytest.mark.parametrize("name", CASES)
def test_tokens_of_the_projector_and_back(name, tmp_path):
    cls, sections, count = CASES[name]
    model = made(cls, sections)
    model.save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    images = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        found = model.model.get_image_features(torch.from_numpy(images.transpose(0, 3, 1, 2)), return_dict=True)
    expected = torch.stack(list(found.pooler_output)).numpy()
    tokens = jax.jit(functools.partial(ours.apply, method="visual_tokens"))(jnp.asarray(images)).tokens
    assert tokens.shape == expected.shape == (2, count, TEXT["hidden_size"])
    assert np.abs(np.asarray(tokens) - expected).max() <= 1e-4 * np.abs(expected).max()
    ours.save_pretrained(tmp_path / "ours")
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_the_decoders_width_is_that_of_the_projector():
    with pytest.raises(PretrainedError, match=r"llava: expected a tensor named multi_modal_projector\.linear_2"):
        vlm_jax.pretrained.FAMILIES["llava"](
            {"model_type": "llava", **LLAVA}, {}, dtype=jnp.float32, param_dtype=jnp.float32
        )


@pytest.mark.parametrize(("kind", "config"), [("llava", LLAVA), ("internvl", internvl())])
def test_several_hidden_states_are_refused(kind, config):
    released = {"model_type": kind, **config, "vision_feature_layer": [-2, -1]}
    with pytest.raises(PretrainedError, match=rf"{kind}\.vision_feature_layer: expected .*one .*got \[-2, -1\]"):
        vlm_jax.pretrained.FAMILIES[kind](released, {}, dtype=jnp.float32, param_dtype=jnp.float32)

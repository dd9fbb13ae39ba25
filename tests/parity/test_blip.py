"""BLIP-2 and InstructBLIP compared with transformers: full models, Q-Formers and towers, from files and back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Model,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    InstructBlipVisionModel,
    OPTConfig,
)

import vlm_jax
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.types import Batch, Instruction, VisualFeatures

VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 12,
    "patch_size": 4,
}
QFORMER = {
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 20,
    "max_position_embeddings": 9,
    "encoder_hidden_size": 24,
}
TEXT = OPTConfig(
    hidden_size=20, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=20, word_embed_proj_dim=20
)
WHOLE = {"blip-2": (Blip2Config, Blip2Model, Blip2ForConditionalGeneration)}
WHOLE["instructblip"] = (InstructBlipConfig, InstructBlipModel, InstructBlipForConditionalGeneration)
IMAGES = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
IDS = np.random.default_rng(1).integers(1, 20, size=(2, 6))
REAL = np.arange(6)[None] < np.array([[6], [2]])


def randomised(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.5)
    return module.eval()


@functools.cache
def made(kind, generates=True):
    config, *classes = WHOLE[kind]
    config = config(vision_config=VISION, qformer_config=QFORMER, text_config=TEXT, num_query_tokens=5)
    return randomised(classes[generates](config))


def error(ours, theirs):
    theirs = theirs.numpy()
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def expected(model, images, **more):
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    if hasattr(model.config.qformer_config, "use_qformer_text_input"):
        text = {}
    else:
        text = {"qformer_input_ids": torch.from_numpy(IDS), "qformer_attention_mask": torch.from_numpy(REAL).long()}
    with torch.no_grad():
        return model.get_image_features(pixels, **text, **more)


def batch(kind, images):
    """One image an example, and where the Q-Former reads one, an instruction."""
    row = jnp.zeros((len(images), 1), jnp.int32)
    instruction = Instruction(jnp.asarray(IDS, jnp.int32), jnp.asarray(REAL)) if kind == "instructblip" else None
    return Batch(row, row, row, row, images=jnp.asarray(images[:, None]), instruction=instruction)


def check_export(ours, model, folder):
    ours.save_pretrained(folder)
    again, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


@pytest.mark.parametrize("kind", WHOLE)
def test_the_visual_half_of_a_whole_model(tmp_path, kind):
    model = made(kind)
    model.save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    theirs = expected(model, IMAGES)
    found = jax.jit(ours.apply)(batch(kind, IMAGES))
    encoded = jax.jit(lambda images: ours.apply(images, method=lambda module, images: module.encoder(images)))
    assert error(encoded(jnp.asarray(IMAGES)).tokens, theirs.last_hidden_state) <= 1e-5
    assert error(found.tokens, theirs.pooler_output) <= 1e-4
    assert found.mask.all()
    check_export(ours, model, tmp_path / "ours")


@pytest.mark.parametrize("kind", WHOLE)
def test_a_model_without_the_language_head(tmp_path, kind):
    model = made(kind, generates=False)
    model.save_pretrained(tmp_path / "torch")
    check_export(vlm_jax.from_pretrained(tmp_path / "torch"), model, tmp_path / "ours")


def test_images_of_another_size(tmp_path):
    images = np.random.default_rng(2).normal(size=(2, 20, 20, 3)).astype(np.float32)
    made("blip-2").save_pretrained(tmp_path)
    ours = vlm_jax.from_pretrained(tmp_path, image_size=20)
    theirs = expected(made("blip-2"), images, interpolate_pos_encoding=True).pooler_output
    assert ours.config["vision_config"]["image_size"] == 20
    assert error(jax.jit(ours.apply)(batch("blip-2", images)).tokens, theirs) <= 1e-4


@pytest.mark.parametrize("cls", [Blip2VisionModel, InstructBlipVisionModel])
def test_the_tower_alone(tmp_path, cls):
    model = randomised(cls(cls.config_class(**VISION, qkv_bias=cls is Blip2VisionModel)))
    model.save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    with torch.no_grad():
        theirs = model(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())).last_hidden_state
    assert error(jax.jit(ours.apply)(jnp.asarray(IMAGES)).tokens, theirs) <= 1e-5
    check_export(ours, model, tmp_path / "ours")


@pytest.mark.parametrize(
    ("cls", "config"), [(Blip2QFormerModel, Blip2QFormerConfig), (InstructBlipQFormerModel, InstructBlipQFormerConfig)]
)
def test_the_qformer_alone(tmp_path, cls, config):
    model = randomised(cls(config(**QFORMER)))
    model.save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    rng = np.random.default_rng(0)
    queries, tokens = (rng.normal(size=(2, n, d)).astype(np.float32) for n, d in ((5, 16), (7, 24)))
    mask = np.arange(7)[None] < np.array([[7], [4]])
    given = (jnp.asarray(queries), VisualFeatures(jnp.asarray(tokens), jnp.asarray(mask), (1, 7)))
    read = {"encoder_hidden_states": torch.from_numpy(tokens), "encoder_attention_mask": torch.from_numpy(mask)}
    if cls is InstructBlipQFormerModel:
        seen = torch.cat([torch.ones(2, 5, dtype=torch.long), torch.from_numpy(REAL).long()], dim=1)
        read |= {"input_ids": torch.from_numpy(IDS), "attention_mask": seen}
        given = (*given, Instruction(jnp.asarray(IDS, jnp.int32), jnp.asarray(REAL)))
    with torch.no_grad():
        theirs = model(query_embeds=torch.from_numpy(queries), **read).last_hidden_state[:, :5]
    assert error(jax.jit(ours.apply)(*given), theirs) <= 1e-4
    check_export(ours, model, tmp_path / "ours")


def test_what_cannot_be_computed_is_refused(tmp_path):
    config = Blip2QFormerConfig(**{**QFORMER, "num_hidden_layers": 1}, use_qformer_text_input=True)
    Blip2QFormerModel(config).save_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match=r"blip_2_qformer\.use_qformer_text_input: expected False, got True"):
        vlm_jax.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", WHOLE)
def test_real_sizes_have_as_many_parameters(kind):
    config, model, _ = WHOLE[kind]
    config = config(text_config=OPTConfig(num_hidden_layers=1))
    with torch.device("meta"):
        theirs = model(config)
    counted = sum(p.numel() for name, p in theirs.named_parameters() if not name.startswith("language_model."))
    stand_in = {"language_projection.weight": np.zeros((theirs.language_projection.out_features, 1))}
    description = vlm_jax.pretrained.FAMILIES[kind](
        {"model_type": kind}, stand_in, dtype=jnp.float32, param_dtype=jnp.float32
    )
    shapes = jax.eval_shape(description.module.init, jax.random.key(0), *description.inputs)
    (smallest,) = description.inputs
    whole = dataclasses.replace(smallest, images=jax.ShapeDtypeStruct((1, 1, 224, 224, 3), jnp.float32))
    out = jax.eval_shape(description.module.init_with_output, jax.random.key(0), whole)[0]
    assert out.tokens.shape == (1, 32, theirs.language_projection.out_features)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == counted

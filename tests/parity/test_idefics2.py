"""Idefics2 compared with transformers: images of several sizes through tower and perceiver, from files and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Model
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

import vlm_jax
from vlm_jax.encoders.naflex import nearest_of_table
from vlm_jax.pretrained import FAMILIES
from vlm_jax.types import Batch, PackedPatches

PATCH = 4
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 20,
    "patch_size": PATCH,
}
TEXT = {
    "model_type": "mistral",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 20,
    "rms_norm_eps": 1e-3,
    "pad_token_id": 0,
}
PERCEIVER = {
    "resampler_n_latents": 5,
    "resampler_depth": 2,
    "resampler_n_heads": 4,
    "resampler_head_dim": 6,
    "num_key_value_heads": 2,
}
GRIDS = [(5, 5), (3, 7), (8, 2)]  # patches; the table has 5x5


def made(cls, config):
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.5)
    return model


def images():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(rows * PATCH, cols * PATCH, 3)).astype(np.float32) for rows, cols in GRIDS]


def padded():
    """All images in one array of pixels, and where they are."""
    height, width = (max(sides) * PATCH for sides in zip(*GRIDS, strict=True))
    pixels, mask = np.zeros((len(GRIDS), 3, height, width), np.float32), np.zeros((len(GRIDS), height, width), bool)
    for i, image in enumerate(images()):
        pixels[i, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
        mask[i, : image.shape[0], : image.shape[1]] = True
    return torch.from_numpy(pixels), torch.from_numpy(mask)


def packed():
    """One image a sequence."""
    length = max(rows * cols for rows, cols in GRIDS) + 1
    patches = np.full((len(GRIDS), length, PATCH * PATCH * 3), 9.0, np.float32)
    positions, sizes = np.zeros((2, len(GRIDS), length, 2), np.int32)
    segments = np.zeros((len(GRIDS), length), np.int32)
    for i, (image, (rows, cols)) in enumerate(zip(images(), GRIDS, strict=True)):
        count = rows * cols
        cut = image.reshape(rows, PATCH, cols, PATCH, 3).swapaxes(1, 2)
        patches[i, :count] = cut.reshape(count, -1)
        positions[i, :count] = np.stack(np.divmod(np.arange(count), cols), axis=-1)
        sizes[i, :count], segments[i, :count] = (rows, cols), 1
    return PackedPatches(*map(jnp.asarray, (patches, positions, sizes, segments)))


def error(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def check_export(ours, model, folder):
    ours.save_pretrained(folder)
    again, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


@pytest.mark.parametrize("cls", [Idefics2ForConditionalGeneration, Idefics2Model])
@pytest.mark.parametrize("own", [{}, {"hidden_size": 32, "rms_norm_eps": 1e-2}])
def test_the_visual_half(tmp_path, cls, own):
    config = Idefics2Config(vision_config=VISION, text_config=TEXT, perceiver_config={**PERCEIVER, **own})
    model = made(cls, config)
    model.save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    pixels, mask = padded()
    with torch.no_grad():
        expected = model.get_image_features(pixels[:, None], mask[:, None], return_dict=True).pooler_output
    row = jnp.zeros((len(GRIDS), 1), jnp.int32)
    found = jax.jit(ours.apply)(Batch(row, row, row, row, images=packed()))
    assert error(found.tokens, torch.stack(list(expected)).numpy()) <= 1e-4
    assert found.mask.all()
    check_export(ours, model, tmp_path / "ours")


def test_the_tower_alone(tmp_path):
    model = made(Idefics2VisionTransformer, Idefics2VisionConfig(**VISION))
    model.save_pretrained(tmp_path / "torch")
    ours = vlm_jax.from_pretrained(tmp_path / "torch")
    pixels, mask = padded()
    real = mask[:, ::PATCH, ::PATCH].contiguous()
    with torch.no_grad():
        out = model(pixels, real, output_hidden_states=True)
    found = jax.jit(lambda x: ours.apply(x, collect=True))(packed())
    for i, (rows, cols) in enumerate(GRIDS):
        ours_of_image, count = found.hidden[:, i, : rows * cols], rows * cols
        states = [state[i][real[i].flatten()].numpy() for state in (*out.hidden_states, out.last_hidden_state)]
        assert error(ours_of_image[1], states[1]) <= 1e-5
        assert error(found.tokens[i, :count], states[-1]) <= 1e-4
    check_export(ours, model, tmp_path / "ours")


@pytest.mark.parametrize("side", [1, 3, 7, 14, 16, 24, 27, 32, 70])
def test_the_rows_that_rounding_decides(side):
    """Every place of every number of patches, as the release finds it."""
    sizes = [(rows, place) for rows in range(1, 101) for place in range(rows)]
    edges = torch.arange(1 / side, 1.0, 1 / side)
    expected = [
        torch.bucketize(
            torch.clamp(torch.arange(rows, dtype=torch.float32) * (1.0 / torch.tensor([rows])), max=1.0 - 1e-6),
            edges,
            right=True,
        )
        for rows in range(1, 101)
    ]
    table = jnp.arange(side, dtype=jnp.float32)[:, None, None]
    rows, place = np.array(sizes, np.int32).T
    positions, counts = (np.stack([x, y], axis=-1)[None] for x, y in ((place, 0 * place), (rows, 0 * rows + 1)))
    found = jax.jit(nearest_of_table)(table, positions, counts)
    np.testing.assert_array_equal(found[0, :, 0], torch.cat(expected).numpy())


def test_the_released_sizes_have_as_many_parameters():
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    config = Idefics2Config(vision_config={**vision, "image_size": 980, "patch_size": 14})
    with torch.device("meta"):
        theirs = Idefics2Model(config)
    parts = (theirs.vision_model, theirs.connector)
    shape = np.broadcast_to(0.0, theirs.connector.modality_projection.down_proj.weight.shape)
    description = FAMILIES["idefics2"](
        {"model_type": "idefics2", "vision_config": config.vision_config.to_dict()},
        {"connector.modality_projection.down_proj.weight": shape},
        dtype=jnp.bfloat16,
        param_dtype=jnp.float32,
    )
    shapes = jax.eval_shape(description.module.init, jax.random.key(0), *description.inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == sum(p.numel() for x in parts for p in x.parameters())
    assert description.module.connector.norm_epsilon == theirs.connector.perceiver_resampler.rms_norm_eps

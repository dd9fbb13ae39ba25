"""Whole systems of transformers whose embeddings are tied where they are not by default, or the other way round.

Logits of batches through files, and the way back; the systems as they are by default stand in
`test_system_generation.py`.
"""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers

import vlm_jax
from vlm_jax.processors.patches import pack_patches
from vlm_jax.types import Batch

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 128,
}
LLAMA, QWEN2 = {**TEXT, "model_type": "llama"}, {**TEXT, "model_type": "qwen2"}
SIGLIP = {name: CLIP[name] for name in CLIP if name != "model_type"}
IMAGE, VIDEO, START, END = 40, 41, 42, 43
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
QWEN_TOWER = {"num_heads": 4, "patch_size": 4, "hidden_size": 32}


@dataclasses.dataclass(frozen=True)
class Case:
    """A system.

    Attributes:
      cls: its class in transformers.
      config: its sections.
    """

    cls: str
    config: dict


CASES = {
    "llava, tied, in front of Qwen2": Case(
        "Llava",
        {"vision_config": CLIP, "text_config": QWEN2, "image_token_index": IMAGE, "tie_word_embeddings": True},
    ),
    "deepseek_vl, untied": Case(
        "DeepseekVL",
        {"vision_config": SIGLIP, "text_config": LLAMA, "image_token_id": IMAGE, "tie_word_embeddings": False},
    ),
}
GRIDS = [(1, 4, 6), (1, 2, 2), (2, 4, 4)]  # of two images and a video, in patches
PACKED = {
    "qwen2_vl": ("Qwen2VL", {**QWEN_TOWER, "depth": 2, "embed_dim": 48, "mlp_ratio": 2}),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            **QWEN_TOWER,
            "depth": 3,
            "intermediate_size": 40,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
}


def made(name, sections):
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    torch.manual_seed(0)
    model = cls(cls.config_class(**sections)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def rows(runs):
    """Ids of text with a run of `IMAGE` for every count, one row a list of counts, padded on the left."""
    draw = np.random.default_rng(0)
    found = []
    for counts in runs:
        parts = [draw.integers(0, IMAGE, 3)]
        for count in counts:
            parts += [np.full(count, IMAGE), draw.integers(0, IMAGE, 2)]
        found.append(np.concatenate(parts))
    length = max(map(len, found))
    ids = np.stack([np.pad(row, (length - len(row), 0)) for row in found])
    mask = np.stack([np.pad(np.ones(len(row), int), (length - len(row), 0)) for row in found])
    return ids, mask


def batch_of(ids, mask, images):
    """Our batch: image tokens in order, positions counted from the first token."""
    index = np.where(ids == IMAGE, np.cumsum(ids == IMAGE, axis=1) - 1, -1)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    arrays = (array.astype(np.int32) for array in (ids, positions, mask, index))
    return Batch(*arrays, images=images)


def check(model, batch, theirs, folder):
    """Logits of every real position through a saved folder, and the same model back from ours."""
    model.save_pretrained(folder / "torch")
    ours = vlm_jax.from_pretrained(folder / "torch")
    expected = theirs(model)
    real = np.asarray(batch.segment_ids) > 0
    found = np.asarray(ours.logits(batch))
    assert found.shape == expected.shape and found.dtype == np.float32
    assert np.abs(found - expected)[real].max() <= 1e-4 * np.abs(expected[real]).max()
    ours.save_pretrained(folder / "ours")
    again, report = type(model).from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(theirs(again), expected)


def torch_logits(ids, mask, **more):
    positions = torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0))
    more = {"position_ids": positions, **more}

    def run(model):
        with torch.no_grad():
            out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **more)
        return out.logits.numpy()

    return run


@pytest.mark.parametrize("name", CASES)
def test_logits_of_images_of_one_size(name, tmp_path):
    case = CASES[name]
    images = np.random.default_rng(1).normal(size=(2, 2, 16, 16, 3)).astype(np.float32)
    ids, mask = rows([[16, 16], [16]])  # of an image of 16 x 16 pixels
    model = made(case.cls, case.config)
    pixels = torch.from_numpy(np.stack([images[0, 0], images[0, 1], images[1, 0]]).transpose(0, 3, 1, 2))
    batch = batch_of(ids, mask, images)
    check(model, batch, torch_logits(ids, mask, pixel_values=pixels), tmp_path)


@pytest.mark.parametrize("name", PACKED)
def test_logits_of_packed_images_and_a_video(name, tmp_path):
    cls, tower = PACKED[name]
    text = {**TEXT, "rope_parameters": MROPE, "bos_token_id": 0, "eos_token_id": 1}
    model = made(cls, {"text_config": text, "vision_config": tower, "tie_word_embeddings": True, **QWEN})
    config = model.config.vision_config
    counts = [int(np.prod(grid)) // 4 for grid in GRIDS]
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    patches = np.random.default_rng(1).normal(size=(4 * sum(counts), width)).astype(np.float32)
    ids, mask = rows([[*counts[:2], counts[2]], []])
    visual = ids[0] == IMAGE
    ids[0, np.flatnonzero(visual & ~np.pad(visual[:-1], (1, 0))) - 1] = START
    ids[0, np.flatnonzero(visual)[-counts[2] :]] = VIDEO
    video = 4 * (counts[0] + counts[1])
    grids = torch.tensor(GRIDS)
    more = {
        "pixel_values": torch.from_numpy(patches[:video]),
        "image_grid_thw": grids[:2],
        "pixel_values_videos": torch.from_numpy(patches[video:]),
        "video_grid_thw": grids[2:],
    }
    types = torch.tensor(np.where(ids == VIDEO, 2, np.where(ids == IMAGE, 1, 0)))
    positions, _ = model.model.get_rope_index(
        torch.tensor(ids),
        mm_token_type_ids=types,
        image_grid_thw=grids[:2],
        video_grid_thw=grids[2:],
        attention_mask=torch.tensor(mask),
    )
    encoder = packing(config)
    none = (patches[:0], np.zeros((0, 3), int))
    length = pack_patches(patches, GRIDS, **encoder).patches.shape[1]
    packed = [pack_patches(*given, length=length, **encoder) for given in ((patches, GRIDS), none)]
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *packed)
    batch = batch_of(np.where(ids == VIDEO, IMAGE, ids), mask, joined)
    batch = dataclasses.replace(
        batch, tokens=ids.astype(np.int32), positions=np.moveaxis(positions.numpy(), 0, -1).astype(np.int32)
    )
    check(model, batch, torch_logits(ids, mask, position_ids=positions, **more), tmp_path)


def packing(config):
    """How a tower wants its patches packed."""
    window = getattr(config, "window_size", None)
    side = config.patch_size * config.spatial_merge_size
    return {"merge_size": config.spatial_merge_size, "window": None if window is None else window // side}

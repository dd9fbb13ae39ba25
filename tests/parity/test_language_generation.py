"""Greedy ids of tiny random language models beside `generate` of transformers, in ragged batches and one by one."""

import dataclasses

import numpy as np
import pytest
import torch

import vlm_jax
from vlm_jax.generation.engine import generate
from vlm_jax.types import Batch

from .test_language_models import MODELS, SIZES, SYSTEMS, loaded_text, made, made_system

NEW = 32
LENGTHS = (5, 9, 12)  # within and beyond the positions of training of the scaled rotary settings
ONE_BY_ONE = ("llama, dynamic", "qwen2, upper layers with windows", "qwen3")


def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(0, SIZES["vocab_size"], size=length) for length in LENGTHS]


def batch_of(rows, side):
    """Prompts as one batch, padded on one side with what is of no account."""
    length = max(map(len, rows))

    def padded(row, values, fill):
        missing = length - len(row)
        return np.pad(values, (missing, 0) if side == "left" else (0, missing), constant_values=fill)

    def column(values, fill):
        return np.stack([padded(row, values(row), fill) for row in rows]).astype(np.int32)

    return Batch(
        tokens=column(lambda row: row, 7),
        positions=column(lambda row: np.arange(len(row)), 3),
        segment_ids=column(np.ones_like, 0),
        visual_index=column(lambda row: -np.ones_like(row), -1),
    )


def theirs(model, row):
    model.generation_config.eos_token_id = None
    ids = torch.tensor(row[None])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(ids))
    return out[0, len(row) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_ids_of_ragged_batches(name, tmp_path):
    rows = prompts()
    expected = [theirs(made(name), row) for row in rows]  # rotary settings by length remember what they saw
    assert all(len(set(ids)) >= NEW // 4 for ids in expected)
    made(name).save_pretrained(tmp_path)
    ours = vlm_jax.from_pretrained(tmp_path)

    def ids(batch):
        return generate(ours.module, ours.params, batch, max_new_tokens=NEW).tokens.tolist()

    assert ids(batch_of(rows, "left")) == expected
    assert ids(batch_of(rows, "right")) == expected
    if name in ONE_BY_ONE:
        assert [ids(batch_of([row], "left"))[0] for row in rows] == expected


@pytest.mark.parametrize("kind", SYSTEMS)
def test_greedy_ids_with_positions_on_three_axes(kind, tmp_path):
    rows, model = prompts(), made_system(kind, {"rope_type": "default"})
    expected = [theirs(model, row) for row in rows]
    ours, _ = loaded_text(model, tmp_path)
    batch = batch_of(rows, "left")
    batch = dataclasses.replace(batch, positions=np.repeat(batch.positions[..., None], 3, axis=-1))
    assert generate(ours.module, ours.params, batch, max_new_tokens=NEW).tokens.tolist() == expected

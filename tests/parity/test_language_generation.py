"""Greedy ids of tiny random language models compared with `generate` of transformers, in ragged batches and alone."""

import dataclasses
import functools

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
    """Prompts as one batch, padded on one side with arbitrary ids."""
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


def with_a_picture(length):
    """Positions on three axes: two tokens, an image of 1 x 2 x 3, and what follows it."""
    grid = [[2, 2 + row, 2 + column] for row in range(2) for column in range(3)]
    axes = [[0] * 3, [1] * 3, *grid, *([5 + i] * 3 for i in range(length))]
    return np.array(axes[:length])


def their_steps(model, row, positions):
    """Greedy ids, each by a run over all before it: `generate` would lay text out on three equal axes."""
    ids, positions = row.tolist(), positions.tolist()
    while len(ids) < len(row) + NEW:
        places = torch.tensor(positions).T[:, None]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), position_ids=places, use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        positions.append([np.max(positions) + 1] * 3)
    return ids[len(row) :]


@pytest.mark.parametrize("kind", SYSTEMS)
def test_greedy_ids_with_positions_on_three_axes(kind, tmp_path):
    rows, model = prompts(), made_system(kind, {"rope_type": "default"})
    ours, _ = loaded_text(model, tmp_path)
    run = functools.partial(generate, ours.module, ours.params, max_new_tokens=NEW)

    def ids(positions, side):
        batch, length = batch_of(rows, side), max(LENGTHS)
        three = np.full((*batch.tokens.shape, 3), 3, np.int32)
        for place, row in zip(three, rows, strict=True):
            place[slice(length - len(row), None) if side == "left" else slice(len(row))] = positions(len(row))
        return run(dataclasses.replace(batch, positions=three)).tokens.tolist()

    def equal(length):
        return np.repeat(np.arange(length)[:, None], 3, axis=1)

    expected = [theirs(model, row) for row in rows]
    assert ids(equal, "left") == ids(equal, "right") == expected
    differing = [their_steps(model, row, with_a_picture(len(row))) for row in rows]
    assert all(one != other for one, other in zip(expected, differing, strict=True))
    assert ids(with_a_picture, "left") == ids(with_a_picture, "right") == differing

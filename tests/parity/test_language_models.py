"""Tiny random language models of transformers: logits through files and rules, greedy ids, and the way back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import vlm_jax
from vlm_jax.checkpoints.hub import open_checkpoint, read_config
from vlm_jax.generation.engine import generate
from vlm_jax.types import Batch

from .language import (
    LENGTHS,
    MODELS,
    NEW,
    ORIGINAL,
    SIZES,
    SYSTEMS,
    batch_of,
    check,
    loaded_text,
    made,
    made_system,
    prompts,
    their_logits,
    theirs,
)

LENGTH, PROMPT = 12, 7


def text(positions=None, rows=2):
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], size=(rows, LENGTH), dtype=np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1)) if positions is None else positions
    return Batch(ids, positions, np.ones_like(ids), np.full_like(ids, -1))


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
            hidden, updated = module(module.embed(tokens), positions, jnp.ones_like(tokens), cache, token_ids=tokens)
            return module.logits(hidden), updated

        return decoder.apply(params, method=logits)

    cache, steps = decoder.init_cache(len(batch.tokens), LENGTH + 3), []
    for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, LENGTH))]:
        logits, cache = run(batch.tokens[:, start:stop], batch.positions[:, start:stop], cache)
        steps.append(logits)
    return np.concatenate(steps, axis=1)


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """The name of a model, its folder, and ours from it."""
    folder = tmp_path_factory.mktemp("torch")
    made(request.param).save_pretrained(folder)
    return request.param, folder, vlm_jax.from_pretrained(folder)


def fresh(folder):
    """Their model, read anew: rotary settings by length remember what they saw."""
    return getattr(transformers, read_config(folder)["architectures"][0]).from_pretrained(folder).eval()


def test_logits_whole_and_step_by_step_and_back(pair, tmp_path):
    _, folder, ours = pair
    batch, model = text(), fresh(folder)
    expected = their_logits(model, batch.tokens)
    check(jax.jit(ours.apply)(batch), expected)
    check(our_steps(ours, batch), their_steps(fresh(folder), batch.tokens))
    ours.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
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


@pytest.mark.parametrize("kind", SYSTEMS)
def test_text_models_with_positions_on_three_axes(kind, tmp_path):
    """Scaled ones; those as they are by default stand in `test_system_generation.py`."""
    scaling = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
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


ONE_BY_ONE = ("llama, dynamic", "qwen2, upper layers with windows")  # what follows from lengths


def test_greedy_ids_of_ragged_batches(pair):
    name, folder, ours = pair
    rows = prompts()
    expected = [theirs(fresh(folder), row) for row in rows]
    assert all(len(set(ids)) >= NEW // 4 for ids in expected)

    def ids(batch):
        return generate(ours.module, ours.params, batch, max_new_tokens=NEW).tokens.tolist()

    assert ids(batch_of(rows, "left")) == expected
    assert ids(batch_of(rows, "right")) == expected
    if name in ONE_BY_ONE:
        assert [ids(batch_of([row], "left"))[0] for row in rows] == expected


def with_a_picture(length):
    """Positions on three axes: two tokens, a picture of 1 x 2 x 3, and what follows it."""
    grid = [[2, 2 + row, 2 + column] for row in range(2) for column in range(3)]
    axes = [[0] * 3, [1] * 3, *grid, *([5 + i] * 3 for i in range(length))]
    return np.array(axes[:length])


def their_ids(model, row, positions):
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
    differing = [their_ids(model, row, with_a_picture(len(row))) for row in rows]
    assert all(one != other for one, other in zip(expected, differing, strict=True))
    assert ids(with_a_picture, "left") == ids(with_a_picture, "right") == differing

"""Released conversational systems with a token budget: counts, logits, mixed and packed rows, positions."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.config import ConfigError
from vlm_jax.processors.processor import Processor
from vlm_jax.reducers import REDUCERS
from vlm_jax.types import RowShape

from .releases import FOLDERS, make

CELLS = {
    **{kind: {"reducer": kind} for kind in REDUCERS if kind != "none"},
    "fastv": {"reducer": {"kind": "fastv", "layer": 1}},
    "pixel_shuffle": {"connector": "pixel_shuffle"},
    "resampler": {"connector": {"kind": "resampler", "num_heads": 4}},
}
IN_DECODER = ("fastv", "pyramid_drop")
BUDGET = 4
# Tokens of a tile, or of the 20x40 image that is packed; and its tiles.
TOKENS = {
    "deepseek_vl": (16, 1),
    "deepseek_vl_hybrid": (16, 1),
    "deepseek_vl_v2": (4, 2),
    "internvl": (4, 3),
    "internvl_chat": (16, 3),
    "llava": (16, 1),
    "llava_llama": (36, 1),
    "llava_next": (16, 3),
    "mobilevlm": (144, 1),
    "multi_modality": (144, 1),
    "ovis": (9, 1),
    "ovis2": (9, 1),
    "ovis2_5": (6, 1),
    "qwen": (9, 1),
    "qwen2_5_vl": (10, 1),
    "qwen2_vl": (10, 1),
}
PACKED = ("ovis2_5", "qwen2_5_vl", "qwen2_vl")
# What is rejected, and a part of the message.
_TILE, _GRID, _BLOCKS = "changes the size of a tile", "needs their grid", "can merge at most half"
REFUSED = {
    **{(name, "downsample_image"): _TILE for name in FOLDERS if name not in PACKED},
    **{(name, "tome"): _GRID for name in ("deepseek_vl_v2", "internvl", "internvl_chat", "mobilevlm")},
    **{(name, "tome"): _GRID for name in ("ovis", "ovis2", "qwen")},
    **{(name, "tome"): _BLOCKS for name in ("llava_llama", "multi_modality")},
    **{(name, "tome"): "breaks the windows and blocks" for name in PACKED},
    ("deepseek_vl_hybrid", "tome"): "has no blocks of its own",
    **{(name, kind): "no field saliency" for name in ("deepseek_vl_hybrid", "ovis", "ovis2")
       for kind in ("visionzip", "prumerge")},
    **{("qwen", kind): "queries without a position" for kind in ("visionzip", "prumerge")},
    **{(name, "resampler"): "packs several of any size" for name in PACKED},
}  # fmt: skip
SIZES = [(20, 40), (33, 24), (16, 16)]  # of images, in pixels


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The model of a system, loaded once."""
    return functools.cache(lambda name: make(name, tmp_path_factory.mktemp(name)))


def conversation(count):
    pictures = [{"type": "image"} for _ in range(count)]
    text = f"What is {count}?"
    return [
        {"role": "user", "content": [*pictures, {"type": "text", "text": text}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]


def pictures(count):
    draw = np.random.default_rng(0)
    return [draw.integers(0, 255, (*size, 3), np.uint8) for size in SIZES[:count]]


def example(name, processor: Processor, count):
    return processor.example(conversation(count), pictures(count), targets=True, **FOLDERS[name].options)


def close(found, expected):
    assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", sorted(FOLDERS))
@pytest.mark.parametrize("cell", CELLS)
def test_a_budget_is_met_or_refused(name, cell, released):
    model = released(name)
    tokens, tiles = TOKENS[name]
    if (name, cell) in REFUSED:
        with pytest.raises((ConfigError, InfeasibleBudget), match=REFUSED[name, cell]):
            model.with_budget(BUDGET, **CELLS[cell])
        return
    found = model.with_budget(BUDGET, **CELLS[cell])
    processor = found.processor
    batch = processor.rows([[example(name, processor, 1)]], targets=True)
    shown = int((batch.visual_index >= processor.num_learned).sum())
    if name in PACKED and cell in ("downsample_image", "pixel_shuffle"):
        assert 1 <= shown <= BUDGET  # fewer pixels, of the image's aspect
    elif cell in IN_DECODER:
        assert shown >= tokens
        length = int((batch.segment_ids > 0).sum())
        assert batch.places.lengths[-1] == length - max(0, tokens - BUDGET) * tiles
    else:
        assert shown == min(BUDGET, tokens) * tiles
    run = found.logits if name in ("llava", "qwen2_5_vl") or cell == "divprune" else functools.partial(shapes, found)
    logits = run(batch)
    assert logits.shape[:2] == batch.tokens.shape and logits.dtype == np.float32
    if not isinstance(logits, jax.ShapeDtypeStruct):
        assert np.isfinite(logits).all()


def shapes(model, batch):
    return jax.eval_shape(lambda params, batch: model.module.apply({"params": params}, batch), model.params, batch)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_full_budget_changes_no_logit(name, released):
    model = released(name)
    expected = model.logits(model.processor.rows([[example(name, model.processor, 1)]], targets=True))
    for cell in ("random", "uniform_stride", "visionzip", "divprune", "fastv", "pyramid_drop"):
        found = model.with_budget(None, **CELLS[cell])
        batch = found.processor.rows([[example(name, found.processor, 1)]], targets=True)
        close(found.logits(batch), expected)


@pytest.mark.parametrize(
    ("name", "cell"), [*((name, "divprune") for name in sorted(FOLDERS)), ("llava", "fastv"), ("qwen2_5_vl", "fastv")]
)
def test_rows_do_not_depend_on_their_neighbours(name, cell, released):
    """Of 0, 1 and 3 images in a batch, and of two conversations in a row."""
    model = released(name).with_budget(BUDGET, **CELLS[cell])
    processor = model.processor
    examples = [example(name, processor, count) for count in (0, 1, 3)]
    for count, one in zip((0, 1, 3), examples, strict=True):
        sizes = SIZES[:count]
        assert processor.measure(conversation(count), sizes, targets=True, **FOLDERS[name].options) == one.load
    pair = [sum(one.load.length for one in examples[1:]), sum(one.load.images for one in examples[1:])]
    shape = RowShape(*pair)
    alone = [rows_of(model, [[one]], shape)[0] for one in examples]
    together = rows_of(model, [[one] for one in examples], shape)
    for found, expected in zip(together, alone, strict=True):
        close(found[0], expected[0])
    packed = rows_of(model, [[examples[1], examples[2]]], shape)[0]
    assert len(packed) == 2
    close(packed[0], alone[1][0])
    close(packed[1], alone[2][0])


def rows_of(model, rows, shape):
    """Of every row the logits of each of its segments, at its text."""
    batch = model.processor.rows(rows, shape, targets=True)
    logits = np.asarray(model.logits(batch))
    found = []
    for row, segments, index in zip(logits, batch.segment_ids, batch.visual_index, strict=True):
        found.append([row[(segments == number) & (index < 0)] for number in range(1, segments.max() + 1)])
    return found


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_kept_tokens_keep_their_positions(name, released):
    """As the release gives them where the other tokens are left out of its row by hand."""
    model = released(name)
    full = model.processor.rows([[example(name, model.processor, 1)]], targets=True)
    count = TOKENS[name][0]
    kept = np.arange(BUDGET) * count // BUDGET
    index = full.visual_index[0]
    stays = np.flatnonzero((index < 0) | np.isin(index, kept))
    fields = ("tokens", "positions", "segment_ids", "visual_index", "targets", "loss_weights")
    by_hand = dataclasses.replace(full, **{field: getattr(full, field)[:, stays] for field in fields})
    reduced = model.with_budget(BUDGET, reducer={"kind": "uniform_stride", "positions": "keep"})
    batch = reduced.processor.rows([[example(name, reduced.processor, 1)]], targets=True)
    np.testing.assert_array_equal(batch.tokens, by_hand.tokens)
    text = batch.visual_index[0] < 0
    np.testing.assert_array_equal(batch.positions[0][text], by_hand.positions[0][text])
    embed = jax.jit(functools.partial(reduced.apply, method="embed"))
    np.testing.assert_array_equal(embed(batch).positions, by_hand.positions)
    close(reduced.logits(batch), model.logits(by_hand))

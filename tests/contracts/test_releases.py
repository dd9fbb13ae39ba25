"""Released conversational systems with a token budget: counts, logits, mixed and packed rows, positions."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.config import ConfigError
from vlm_jax.pretrained.budgets import with_budget
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
# Logits in every cell would take a quarter more time, most of it to compile. So of each system those of one cell are
# computed for each mechanism (tokens chosen, tokens ranked by attention, tokens merged, fewer pixels, tokens dropped
# in the decoder, another connector), and shapes alone in the other cells; of two systems the logits of all cells.
COMPUTED = ("divprune", "visionzip", "tome", "downsample_image", "fastv", "pixel_shuffle")
ALL_COMPUTED = ("llava", "qwen2_5_vl")
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
# What is refused, and a part of the message.
_GRID, _BLOCKS = "needs their grid", "can merge at most half"
REFUSED = {
    ("qwen", "downsample_image"): "queries of Resampler make 9 tokens all the same",
    ("deepseek_vl_hybrid", "downsample_image"): "Hybrid gives 4x4 of 32x32 pixels",
    **{(name, "tome"): _GRID for name in ("deepseek_vl_v2", "internvl", "internvl_chat", "mobilevlm")},
    **{(name, "tome"): _GRID for name in ("ovis", "ovis2", "qwen")},
    **{(name, "tome"): _BLOCKS for name in ("llava_llama", "multi_modality")},
    **{(name, "tome"): "breaks the windows and blocks" for name in PACKED},
    ("deepseek_vl_hybrid", "tome"): "has no blocks of its own",
    **{("deepseek_vl_hybrid", kind): "no field saliency" for kind in ("visionzip", "prumerge")},
    **{("qwen", kind): "queries without a position" for kind in ("visionzip", "prumerge")},
    **{(name, "resampler"): "packs several of any size" for name in PACKED},
}  # fmt: skip
SIZES = [(20, 40), (33, 24), (16, 16)]  # of images, in pixels


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The model of a system, loaded once."""
    return functools.cache(lambda name: make(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def logits_of(released):
    """A function of a system's name and its model, however reduced, that gives logits of batches.

    It embeds by a program of its own, and decodes by one that all models of the system share for rows of a length:
    parameters and maths of the decoder are the release's, unless it drops tokens.
    """

    def decode(module, given, branches):
        hidden, _ = module.decoder(given.x, given.positions, given.segment_ids, branch_ids=branches)
        return module.decoder.logits(hidden)

    @functools.cache
    def decoder(name):
        module = released(name).module
        return jax.jit(lambda params, *given: module.apply({"params": params}, *given, method=decode))

    def of(name, model):
        if model.module.decoder.drops:
            return model.logits
        embed = jax.jit(lambda params, batch: model.module.apply({"params": params}, batch, method="embed"))
        part = {"decoder": model.params["decoder"]}
        return lambda batch: decoder(name)(part, embed(model.params, batch), batch.branch_ids)

    return of


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
def test_a_budget_is_met_or_refused(name, cell, released, logits_of):
    model = released(name)
    tokens, tiles = TOKENS[name]
    if (name, cell) in REFUSED:
        with pytest.raises((ConfigError, InfeasibleBudget), match=REFUSED[name, cell]):
            with_budget(model.system, BUDGET, **CELLS[cell])
        return
    computed = cell in COMPUTED or name in ALL_COMPUTED
    found = model.with_budget(BUDGET, **CELLS[cell]) if computed else None
    system = with_budget(model.system, BUDGET, **CELLS[cell]) if found is None else found.system
    processor = system.processor
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
    if found is None:
        params = model.params if "reducer" in CELLS[cell] else nn.meta.unbox(system.boxed_shapes())
        method = None if cell in IN_DECODER else "embed"  # the decoder is then as in the other cells
        run = functools.partial(system.model.apply, method=method)
        given = jax.eval_shape(run, {"params": params}, batch)
        assert (given if method is None else given.x).shape[:2] == batch.tokens.shape
        return
    logits = logits_of(name, found)(batch)
    assert logits.shape[:2] == batch.tokens.shape and logits.dtype == np.float32
    assert np.isfinite(logits).all()


def test_few_cells_are_refused():
    assert len(REFUSED) <= 0.15 * len(FOLDERS) * len(CELLS)


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_an_answer_has_the_budget(name, released, logits_of):
    """It begins with the most likely token of the prompt's logits, and says how many visual tokens it has seen."""
    model, (tokens, tiles) = released(name).with_budget(BUDGET, **CELLS["divprune"]), TOKENS[name]
    prompt, options = conversation(1)[:1], FOLDERS[name].options
    answer = model.generate(prompt, pictures(1), max_new_tokens=2, processor_options=options)
    batch = model.processor.batch([prompt], [pictures(1)], **options)
    learned = int(((batch.visual_index >= 0) & (batch.visual_index < model.processor.num_learned)).sum())
    assert answer.visual_tokens == (min(BUDGET, tokens) * tiles + learned,) and 1 <= len(answer.tokens) <= 2
    assert answer.tokens[0] == np.argmax(logits_of(name, model)(batch)[0, -1])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_full_budget_changes_no_logit(name, released, logits_of):
    model = released(name)
    expected = logits_of(name, model)(model.processor.rows([[example(name, model.processor, 1)]], targets=True))
    for cell in ("random", "uniform_stride", "visionzip", "prumerge", "divprune", "fastv", "pyramid_drop"):
        found = model.with_budget(None, **CELLS[cell])
        batch = found.processor.rows([[example(name, found.processor, 1)]], targets=True)
        close(logits_of(name, found)(batch), expected)


@pytest.mark.parametrize(
    ("name", "cell"), [*((name, "divprune") for name in sorted(FOLDERS)), ("llava", "fastv"), ("qwen2_5_vl", "fastv")]
)
def test_rows_do_not_depend_on_their_neighbours(name, cell, released, logits_of):
    """Of 0, 1 and 3 pictures in a batch with others, and of two conversations in a row."""
    model = released(name).with_budget(BUDGET, **CELLS[cell])
    processor, logits = model.processor, logits_of(name, model)
    examples = {count: example(name, processor, count) for count in (0, 1, 3)}
    for count, one in examples.items():
        sizes = SIZES[:count]
        assert processor.measure(conversation(count), sizes, targets=True, **FOLDERS[name].options) == one.load
    both = [examples[1].load, examples[3].load]
    shape = RowShape(sum(load.length for load in both), sum(load.images for load in both))

    def of_rows(*rows):
        """Of every row the logits of each of its segments, at its text."""
        batch = processor.rows([[examples[count] for count in row] for row in rows], shape, targets=True)
        found = []
        for row, segments, index in zip(np.asarray(logits(batch)), batch.segment_ids, batch.visual_index, strict=True):
            found.append([row[(segments == number) & (index < 0)] for number in range(1, segments.max() + 1)])
        return found

    first, second = of_rows([0], [1], [3], [1]), of_rows([3], [0], [3], [1])
    (packed,) = of_rows([1, 3])
    assert len(packed) == 2
    close(first[0][0], second[1][0])
    for found in (first[3][0], second[3][0], packed[0]):
        close(found, first[1][0])
    for found in (second[0][0], second[2][0], packed[1]):
        close(found, first[2][0])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_kept_tokens_keep_their_positions(name, released, logits_of):
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
    close(logits_of(name, reduced)(batch), logits_of(name, model)(by_hand))


@pytest.mark.parametrize("first", ["divprune", "fastv", "downsample_image"])
def test_a_second_reducer_is_rejected(first, released):
    reduced = released("llava").with_budget(BUDGET, **CELLS[first])
    with pytest.raises(ConfigError, match=r"config\.token_budget: this system has a reducer already"):
        reduced.with_budget(2, reducer="random")

"""Released conversational systems with a token budget: counts, logits, mixed and packed rows, positions."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from vlm_jax.budget import InfeasibleBudget
from vlm_jax.config import ConfigError
from vlm_jax.pretrained.budgets import with_budget
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.reducers import REDUCERS
from vlm_jax.types import RowShape

from ..advice import tried
from .releases import CLIP, DATA, FOLDERS, clip_config, make, write_clip

CELLS = {
    # Those that choose by the question read a CLIP too: GUIDED.
    **{kind: {"reducer": kind} for kind, cls in REDUCERS.items() if cls is not None and cls.guided_by is None},
    "fastv": {"reducer": {"kind": "fastv", "layer": 1}},
    "dart": {"reducer": {"kind": "dart", "layer": 1}},
    "pixel_shuffle": {"connector": "pixel_shuffle"},
    "resampler": {"connector": {"kind": "resampler", "num_heads": 4}},
}
# Kinds that choose by the question: for systems with a CLIP's tower, of which they read the whole CLIP.
GUIDED = [kind for kind, cls in REDUCERS.items() if cls is not None and cls.guided_by is not None]
CLIPS = {"llava": CLIP, "llava_next": CLIP, "llava_llama": "llava15", "mobilevlm": "mobilevlm_v2"}  # or golden folders
LENGTH = 12  # positions of the text tower
# By the encoder's attention.
RANKED = ("visionzip", "prumerge", "fastervlm", "vispruner", "holov", "fastvid", "holitom")
IN_DECODER = ("fastv", "pyramid_drop", "dart", "sparsevlm")
# Tracing and compiling every cell would take most of the time of `make test`. So of each system those of one cell are
# computed for each mechanism (tokens ranked by attention, tokens merged, fewer pixels; tokens chosen, with logits, by
# the test of rows alone). The decoder of a cell is the release's, so that embeddings are all that
# differs, unless tokens are dropped in it: shapes of one such cell, and of each connector's. In the other cells the
# tokens are counted that the processor lays out, which are those of another cell's mechanism. Of two systems all cells
# are computed, drops in the other kinds of decoders, and a drawn connector where it brings learned rows.
COMPUTED = ("visionzip", "tome", "downsample_image")
ALL_COMPUTED = ("llava", "qwen2_5_vl")
ALSO_COMPUTED = (
    ("qwen3_5", "fastv"),
    ("qwen3_vl", "fastv"),
    ("deepseek_vl_v2", "fastv"),
    ("qwen", "fastv"),
    ("ovis", "pixel_shuffle"),
)
TRACED = ("pyramid_drop", "pixel_shuffle", "resampler")
BUDGET = 4
# Tokens of a tile, or of the 20x40 image that is packed; and its tiles.
TOKENS = {
    "DeepseekOCR2": (9, 1),
    "deepseek_ocr": (9, 1),
    "deepseek_ocr2": (9, 1),
    "deepseek_vl": (16, 1),
    "deepseek_vl_hybrid": (16, 1),
    "deepseek_vl_v2": (4, 2),
    "gemma3": (16, 3),
    "gemma4": (8, 1),
    "idefics3": (4, 3),
    "internvl": (4, 3),
    "internvl_chat": (16, 3),
    "llava": (16, 1),
    "llava_llama": (36, 1),
    "llava_next": (16, 3),
    "llava_onevision": (16, 3),
    "llavaonevision1_5": (10, 1),
    "minicpmv4_6": (8, 1),
    "mobilevlm": (144, 1),
    "multi_modality": (144, 1),
    "ovis": (9, 1),
    "ovis2": (9, 1),
    "ovis2_5": (6, 1),
    "paligemma": (16, 1),
    "paligemma_big_vision": (16, 1),
    "prismatic": (16, 1),
    "qwen": (9, 1),
    "qwen2_5_omni": (10, 1),
    "qwen2_5_vl": (10, 1),
    "qwen2_vl": (10, 1),
    "qwen3_5": (10, 1),
    "qwen3_5_moe": (10, 1),
    "qwen3_vl": (10, 1),
    "smolvlm": (16, 3),
}
# Tokens of the tiles behind the whole, where they have another size.
PARTS = dict.fromkeys(("DeepseekOCR2", "deepseek_ocr", "deepseek_ocr2"), (4, 4))
# Tokens of the slices behind a packed whole.
SLICES = {"minicpmv4_6": (9, 9)}
PACKED = (
    *("gemma4", "llavaonevision1_5", "minicpmv4_6", "ovis2_5", "qwen2_5_omni", "qwen2_5_vl", "qwen2_vl", "qwen3_5"),
    *("qwen3_5_moe", "qwen3_vl"),
)
# What is refused, and a part of the message.
_JOINED = (*PARTS, "deepseek_vl_hybrid", "prismatic")  # towers of two encoders
_GRID, _BLOCKS = "needs their grid", "can merge at most half"
REFUSED = {
    ("qwen", "downsample_image"): "queries of Resampler make 9 tokens all the same",
    **{(name, "pyramid_drop"): "which are gated delta layers" for name in ("minicpmv4_6", "qwen3_5", "qwen3_5_moe")},
    ("deepseek_vl_hybrid", "downsample_image"): "Hybrid gives 4x4 of 32x32 pixels",
    ("prismatic", "downsample_image"): "Hybrid",
    **{(name, "tome"): _GRID for name in ("deepseek_vl_v2", "internvl", "internvl_chat", "mobilevlm")},
    **{(name, "tome"): _GRID for name in ("gemma3", "idefics3", "ovis", "ovis2", "qwen")},
    **{(name, "tome"): _BLOCKS for name in ("llava_llama", "multi_modality")},
    **{(name, "tome"): "breaks the windows and blocks" for name in PACKED},
    **{(name, "tome"): "has no blocks of its own" for name in _JOINED},
    **{(name, kind): "no field saliency" for name in _JOINED for kind in RANKED},
    **{("qwen", kind): "queries without a position" for kind in RANKED},
    **{(name, "resampler"): "packs several of any size" for name in PACKED},
}  # fmt: skip
SIZES = [(20, 40), (33, 24), (16, 16)]  # of images, in pixels


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The model of a system, loaded once."""
    return functools.cache(lambda name: make(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def reduced(released):
    """The model of a cell, made once."""
    return functools.cache(lambda name, cell: released(name).with_budget(BUDGET, **CELLS[cell]))


@pytest.fixture(scope="module")
def guided_by(tmp_path_factory):
    """The settings of a kind that chooses by the question, with the folder of the CLIP of a system, written once."""

    @functools.cache
    def written(name):
        folder, vision = tmp_path_factory.mktemp(f"clip_{name}"), CLIPS.get(name, CLIP)
        if isinstance(vision, str):
            vision = json.loads((DATA / vision / "vision_tower_config.json").read_text())
        write_clip(folder, clip_config(vision, LENGTH))
        return str(folder)

    return lambda name, kind: {"kind": kind, "text_model": written(name)}


@functools.cache
def jitted(module, method=None):
    """A function of parameters and a batch; what has the same maths has one program for each shape."""
    return jax.jit(lambda params, batch: module.apply({"params": params}, batch, method=method))


@functools.cache
def decoded(decoder):
    """A function of the decoder's parameters, embeddings, branches and groups that gives logits."""

    def run(module, given, branches, groups):
        marks = {"branch_ids": branches, "levels": given.levels, "group_ids": groups}
        marks["token_ids"] = given.token_ids
        hidden, _ = module(given.x, given.positions, given.segment_ids, **marks)
        return module.logits(hidden)

    return jax.jit(lambda params, *given: decoder.apply({"params": params}, *given, method=run))


def logits_of(model, batch):
    """Logits by a program that embeds, and one that all models of the system share, unless tokens are dropped in it."""
    if model.module.decoder.drops:
        return jitted(model.module)(model.params, batch)
    given = jitted(model.module, "embed")(model.params, batch)
    return decoded(model.module.decoder)(model.params["decoder"], given, batch.branch_ids, batch.group_ids)


def groups_of(name):
    """Tokens of every tile of a picture."""
    tokens, tiles = TOKENS[name]
    return [*[tokens] * tiles, *PARTS.get(name, ()), *SLICES.get(name, ())]


def met(name, cell):
    """Visual tokens of a picture in a cell whose budget is that of a tile."""
    if name in PARTS and cell == "downsample_image":
        return BUDGET  # a mode without tiles
    if name in PARTS and cell == "pixel_shuffle":
        return BUDGET + len(PARTS[name])  # a tile has as many features as the whole has tokens
    return sum(min(BUDGET, tokens) for tokens in groups_of(name))


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


def example(name, processor: Processor, count, targets=True):
    messages = conversation(count)[: 2 if targets else 1]
    return processor.example(messages, pictures(count), targets=targets, **FOLDERS[name].options)


def one_row(name, model):
    """A batch of a conversation with one picture."""
    processor = model.processor
    return processor.rows([[example(name, processor, 1)]], targets=True)


def examples_of(name, processor: Processor):
    """Examples of 0, 1 and 3 pictures, and the shape of a row for the last two."""
    examples = {count: example(name, processor, count) for count in (0, 1, 3)}
    both = [examples[1].load, examples[3].load]
    return examples, RowShape(sum(load.length for load in both), sum(load.images for load in both))


def close(found, expected):
    assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", sorted(FOLDERS))
@pytest.mark.parametrize("cell", CELLS)
def test_a_budget_is_met_or_refused(name, cell, released, reduced):
    model = released(name)
    if (name, cell) in REFUSED:
        with pytest.raises((ConfigError, InfeasibleBudget), match=REFUSED[name, cell]):
            with_budget(model.system, BUDGET, **CELLS[cell])
        return
    drops = cell in IN_DECODER
    computed = cell in COMPUTED or name in ALL_COMPUTED or (name, cell) in ALSO_COMPUTED
    found = reduced(name, cell) if computed else None
    system = with_budget(model.system, BUDGET, **CELLS[cell]) if found is None else found.system
    batch = one_row(name, system)
    shown = int((batch.visual_index >= system.processor.num_learned).sum())
    if name in PACKED and cell in ("downsample_image", "pixel_shuffle"):
        assert 1 <= shown <= BUDGET  # fewer pixels, of the image's aspect
    elif drops:
        assert shown >= TOKENS[name][0]
        length = int((batch.segment_ids > 0).sum())
        assert batch.places.lengths[-1] == length - sum(max(0, tokens - BUDGET) for tokens in groups_of(name))
    else:
        assert shown == met(name, cell)
    if found is None and cell not in TRACED:
        return
    if found is None:
        run = functools.partial(system.model.init_with_output, jax.random.key(0), method=None if drops else "embed")
        given = jax.eval_shape(run, batch)[0]
    elif drops:
        given = logits_of(found, batch)
    else:
        given = jitted(found.module, "embed")(found.params, batch)
    values = given if drops else given.x
    assert values.shape[:2] == batch.tokens.shape and values.dtype == np.float32
    assert found is None or np.isfinite(values).all()


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_budget_by_the_question_is_met_or_refused(name, released, guided_by):
    """Each picture has its own question; what has no CLIP's tower is told so, or what differs."""
    model, (tokens, tiles) = released(name), TOKENS[name]
    for kind in GUIDED:
        if name not in CLIPS:
            with pytest.raises(ConfigError, match=f"{kind} (compares patches|ranks tokens)|is not the CLIP of this"):
                with_budget(model.system, BUDGET, reducer=guided_by("llava", kind))
            continue
        system = with_budget(model.system, BUDGET, reducer=guided_by(name, kind))
        batch = one_row(name, system)
        assert (batch.visual_index >= system.processor.num_learned).sum() == min(BUDGET, tokens) * tiles
        assert batch.question.tokens.shape == (1, tiles, 1, LENGTH)
        run = functools.partial(system.model.init_with_output, jax.random.key(0), method="embed")
        given, params = jax.eval_shape(run, batch)
        assert given.x.shape[:2] == batch.tokens.shape and set(params["params"]) - set(model.params) == {"guide"}


def clip(count=5):
    return [np.random.default_rng(1).integers(0, 255, (20, 40, 3), np.uint8) for _ in range(count)]


def test_a_reducer_of_videos_knows_the_frames_of_a_packed_video(released):
    system = with_budget(released("qwen2_5_vl").system, BUDGET, reducer="dycoke")
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "So?"}]}]
    example = system.processor.example(messages, pictures(1), [clip()])
    batch = system.processor.rows([[example]], targets=False)
    packed = batch.images.images
    times = [len(set(one.positions[:, 0].tolist())) for one in example.images]
    assert packed.frames.tolist() == [times] == [[3, 1]]  # two frames are a patch
    assert packed.counts[0, 0] % 3 == 0 and packed.counts[0, 1] == TOKENS["qwen2_5_vl"][0]
    assert int((batch.visual_index >= 0).sum()) == 2 * BUDGET


def test_frames_that_are_images_are_no_video_to_a_reducer_of_videos(released):
    system = released("internvl_chat").system
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "So?"}]}]
    reduced = with_budget(system, BUDGET, reducer="dycoke").processor
    with pytest.raises(PictureMismatch, match=tried("pass images, or choose a reducer that is not for videos")):
        reduced.example(messages, (), [clip()])
    images = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "So?"}]}]
    assert reduced.example(images, pictures(1)).visual_tokens == (BUDGET * TOKENS["internvl_chat"][1],)
    other = with_budget(system, BUDGET, reducer="random").processor
    assert other.example(messages, (), [clip()]).visual_tokens == (BUDGET * 5,)


def test_few_cells_are_refused():
    assert len(REFUSED) <= 0.15 * len(FOLDERS) * len(CELLS)


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_an_answer_has_the_budget(name, reduced):
    """It begins with the most likely token of the prompt's logits, and says how many visual tokens it has seen."""
    model = reduced(name, "divprune")
    prompt, options = conversation(1)[:1], FOLDERS[name].options
    answer = model.generate(prompt, pictures(1), max_new_tokens=2, processor_options=options)
    asked = example(name, model.processor, 1, targets=False)
    shape = examples_of(name, model.processor)[1]
    batch = model.processor.rows([[asked]] * 4, shape, targets=True)  # the shape of the next test
    learned = int(((batch.visual_index[0] >= 0) & (batch.visual_index[0] < model.processor.num_learned)).sum())
    assert answer.visual_tokens == (met(name, "divprune") + learned,) and 1 <= len(answer.tokens) <= 2
    assert answer.tokens[0] == np.argmax(logits_of(model, batch)[0, asked.load.length - 1])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_full_budget_changes_no_logit(name, released):
    model = released(name)
    expected = logits_of(model, one_row(name, model))
    for cell in ("divprune", "visionzip", "prumerge", "fastv", "pyramid_drop"):
        found = model.with_budget(None, **CELLS[cell])
        close(logits_of(found, one_row(name, found)), expected)


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        *((name, "divprune") for name in sorted(FOLDERS)),
        ("llava", "fastv"),
        ("qwen3_5", "fastv"),
        ("qwen3_vl", "fastv"),
        ("llava_next", "cdpruner"),
    ],
)
def test_rows_give_what_each_gives_alone(name, cell, released, reduced, guided_by):
    """Rows of 0, 1 and 3 pictures in one batch, and two conversations in a row, compared with batches of one row."""
    model = (
        reduced(name, cell) if cell not in GUIDED else released(name).with_budget(BUDGET, reducer=guided_by(name, cell))
    )
    processor = model.processor
    examples, shape = examples_of(name, processor)
    for count, one in examples.items():
        sizes = SIZES[:count]
        assert processor.measure(conversation(count), sizes, targets=True, **FOLDERS[name].options) == one.load

    def of_rows(*rows):
        """Of every row the logits of each of its segments, at its text."""
        batch = processor.rows([[examples[count] for count in row] for row in rows], shape, targets=True)
        found = []
        logits = np.asarray(logits_of(model, batch))
        for row, segments, index in zip(logits, batch.segment_ids, batch.visual_index, strict=True):
            found.append([row[(segments == number) & (index < 0)] for number in range(1, segments.max() + 1)])
        return found

    alone = {count: of_rows([count])[0][0] for count in (0, 1, 3)}
    *mixed, packed = of_rows([0], [1], [3], [1, 3])
    assert [len(row) for row in mixed] == [1, 1, 1] and len(packed) == 2
    for count, found in zip((0, 1, 3, 1, 3), (*(row[0] for row in mixed), *packed), strict=True):
        close(found, alone[count])


def test_resized_grids_of_tokens_in_packed_rows(released):
    """Two conversations in a row, the second with a resized grid, equal a row of each."""
    model = released("llava_onevision")
    full = model.processor
    processor = dataclasses.replace(full, views=dataclasses.replace(full.views, max_tiles=1))
    examples, shape = examples_of("llava_onevision", processor)
    assert example("llava_onevision", full, 1).visual_tokens == (16 + 4 * (8 + 1),)  # on the canvas, and newlines
    assert examples[1].visual_tokens == (16 + 2 * (5 + 1),)
    assert examples[3].visual_tokens == (17,) * 3
    batch = processor.rows([[examples[3], examples[1]], [examples[3]], [examples[1]]], shape, targets=True)
    logits, text = np.asarray(logits_of(model, batch)), batch.visual_index < 0
    for number, alone in ((1, 1), (2, 2)):
        packed = logits[0][text[0] & (batch.segment_ids[0] == number)]
        close(packed, logits[alone][text[alone] & (batch.segment_ids[alone] == 1)])


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_kept_tokens_keep_their_positions(name, released):
    """As the release gives them where the other tokens are left out of its row by hand."""
    model = released(name)
    full = one_row(name, model)
    count = TOKENS[name][0]
    kept = np.arange(BUDGET) * count // BUDGET
    index = full.visual_index[0]
    stays = np.flatnonzero((index < 0) | np.isin(index, kept))
    fields = ("tokens", "positions", "segment_ids", "visual_index", "targets", "loss_weights")
    by_hand = dataclasses.replace(full, **{field: getattr(full, field)[:, stays] for field in fields})
    reduced = model.with_budget(BUDGET, reducer={"kind": "uniform_stride", "positions": "keep"})
    batch = one_row(name, reduced)
    np.testing.assert_array_equal(batch.tokens, by_hand.tokens)
    text = batch.visual_index[0] < 0
    np.testing.assert_array_equal(batch.positions[0][text], by_hand.positions[0][text])
    embedded = jitted(reduced.module, "embed")(reduced.params, batch)
    np.testing.assert_array_equal(embedded.positions, by_hand.positions)
    close(logits_of(reduced, batch), logits_of(model, by_hand))


@pytest.mark.parametrize("first", ["divprune", "fastv", "downsample_image"])
def test_a_second_reducer_is_rejected(first, reduced):
    with pytest.raises(ConfigError, match=r"config\.token_budget: this system has a reducer already"):
        reduced("llava", first).with_budget(2, reducer="random")
